// The choice among instruction sets: the best that runs here by default, any other only by name, and none that this CPU lacks.
// DSO_EXPECTED_ISA: the one that must be chosen on this machine (`make test-arm` knows it for each CPU model it emulates).
#ifndef _WIN32
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "check.hpp"
#include "cpu_features.hpp"

namespace {

// A product of a variant, whether it runs here or not.
void product(const Kernels& k) {
  const int rows = 16, cols = 32;
  std::vector<float> w((size_t)(rows * cols), 0.5f), x((size_t)cols, 1.0f);
  std::vector<uint8_t> packed(packed_bytes(DSO_INT4, rows, cols));
  Buffer row(row_bytes(DSO_SLOT_Q8, cols)), y(4 * (size_t)rows), scratch(k.linear_scratch + 1);
  const Kernels& plain = *isas().front().kernels();
  plain.pack_tile(DSO_INT4, DSO_SRC_F32, w.data(), rows, cols, 4 * cols, nullptr, 0, packed.data());
  plain.convert(DSO_SLOT_Q8, x.data(), 0, cols, cols, row.get());
  k.linear({DSO_INT4, rows, cols, packed.data()}, nullptr, DSO_SLOT_Q8, row.get(), (int64_t)row.size(), 1, false, 0, 1,
           (float*)y.get(), 4 * rows, scratch.get());
  check(std::fabs(((float*)y.get())[0] - 16) < 0.1f, "%s: a product is %g, not 16", k.isa, ((float*)y.get())[0]);
}

// The kernels of a variant that the CPU lacks must trap: so the tests that pass here have executed none of its instructions.
#ifndef _WIN32  // which has no forks
[[maybe_unused]] void traps(const Isa& isa) {
  const pid_t child = fork();
  if (child == 0) {
    product(*isa.kernels());
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  check(WIFSIGNALED(status) && WTERMSIG(status) == SIGILL, "%s: its product ended with status %x where the CPU lacks %s",
        isa.name, status, feature_names(isa.needs & ~detect_features()).c_str());
}
#endif

void by_name(const Isa& isa) {
  dso_context* c = nullptr;
  if (runs_here(isa)) {
    check(dso_context_create(isa.name, 1, &c) == DSO_OK && strcmp(dso_context_isa(c), isa.name) == 0, "%s cannot be chosen: %s",
          isa.name, dso_last_error());
    dso_context_destroy(c);
    return product(*isa.kernels());
  }
  const bool built = isa.kernels() != nullptr;
  const std::string missing = feature_names(isa.needs & ~detect_features());
  if (missing.empty() && built) return;  // what the system refuses on request: AMX
  refuses(dso_context_create(isa.name, 1, &c), DSO_EISA, missing.empty() ? "not in this build" : missing.c_str(), isa.name);
#ifdef __aarch64__
  if (built) traps(isa);
#endif
}

}  // namespace

int main() {
  dso_context* c = nullptr;
  check(dso_context_create(nullptr, 1, &c) == DSO_OK, "no ISA is chosen: %s", dso_last_error());
  const std::string chosen = c ? dso_context_isa(c) : "";
  dso_context_destroy(c);
  if (const char* expected = getenv("DSO_EXPECTED_ISA"))
    check(chosen == expected, "%s is chosen, not %s; this CPU has %s", chosen.c_str(), expected,
          feature_names(detect_features()).c_str());
  for (const Isa& isa : isas()) by_name(isa);
  printf("test_isa: %s is chosen; CPU: %s\n", chosen.c_str(), dso_cpu_description());
  return report("test_isa");
}
