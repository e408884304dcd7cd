// The C interface: checks pointers and converts exceptions to error codes. The work of each call is done in other files.
#include <algorithm>

#include "adapters.hpp"
#include "bandwidth.hpp"
#include "check_arguments.hpp"
#include "choice.hpp"
#include "cache.hpp"
#include "cache_rotate.hpp"
#include "context.hpp"
#include "cpu_features.hpp"
#include "cpu_limits.hpp"
#include "standalone.hpp"
#include "decode.hpp"
#include "drafted_decode.hpp"
#include "dso.h"
#include "error.hpp"
#include "isa.hpp"
#include "layout.hpp"
#include "mapped_files.hpp"
#include "plan.hpp"
#include "shared_group.hpp"
#include "socket_group.hpp"
#include "stage_decode.hpp"
#include "states.hpp"
#include "thread_places.hpp"
#include "topology.hpp"

using namespace dso;

namespace {

constexpr int32_t kMostThreads = 4096, kMostCpus = 1 << 16;

// `body`'s result, or minus the code of its error.
template <class Result, class Body>
Result result_or_code(Body&& body) noexcept {
  Result result = 0;
  const int32_t code = guarded([&] { result = body(); });
  return code == DSO_OK ? result : Result(-code);
}

}  // namespace

extern "C" {

int32_t dso_abi_version(void) { return DSO_ABI_VERSION; }
const char* dso_last_error(void) { return last_error(); }

int32_t dso_isa_count(void) { return int32_t(isas().size()); }
const char* dso_isa_name(int32_t i) { return i >= 0 && i < dso_isa_count() ? isas()[i].name : nullptr; }
int32_t dso_isa_runs_here(const char* name) {
  const Isa* isa = name ? find_isa(name) : nullptr;
  return isa ? runs_here(*isa) : -1;
}
const char* dso_cpu_description(void) {
  const char* result = nullptr;
  guarded([&] {
    static const std::string description = describe_cpu();
    result = description.c_str();
  });
  return result;
}
int32_t dso_topology(dso_cpu* out, int32_t most) {
  return result_or_code<int32_t>([&] {
    const std::vector<Cpu> cpus = read_topology(allowed_cpus());
    if (most > 0) std::copy_n(cpus.begin(), std::min(cpus.size(), size_t(most)), &given(out, "out"));
    return int32_t(cpus.size());
  });
}
int32_t dso_usable_cpus(void) {
  return result_or_code<int32_t>([] { return usable_cpus(int(allowed_cpus().size())); });
}
int32_t dso_default_threads(void) {
  return result_or_code<int32_t>([] { return default_threads(); });
}

int32_t dso_context_create(const char* isa, int32_t threads, dso_context** out) {
  return dso_context_create_on(isa, threads, nullptr, 0, DSO_NODES_MOVE, out);
}
int32_t dso_context_create_on(const char* isa, int32_t threads, const dso_cpu* cpus, int32_t n_cpus, int32_t nodes,
                              dso_context** out) {
  return guarded([&] {
    given(out, "out") = nullptr;
    if (threads > kMostThreads) fail(DSO_EINVAL, "threads is %d, must be at most %d", threads, kMostThreads);
    if (nodes < DSO_NODES_OFF || nodes > DSO_NODES_COPY) fail(DSO_EINVAL, "nodes is %d, must be DSO_NODES_*", nodes);
    if (cpus && (n_cpus < 1 || n_cpus > kMostCpus)) fail(DSO_EINVAL, "n_cpus is %d, must be from 1 to %d", n_cpus, kMostCpus);
    const std::vector<Cpu> all = cpus ? std::vector<Cpu>(cpus, cpus + n_cpus) : read_topology(allowed_cpus());
    for (const Cpu& cpu : all)
      if (cpu.node < 0) fail(DSO_EINVAL, "CPU %d: node is %d, must not be negative", cpu.number, cpu.node);
    if (threads <= 0) threads = cpus ? std::min(cores_of(all), kMostThreads) : default_threads();
    ThreadPlaces places = place_threads(nodes == DSO_NODES_OFF ? std::vector<Cpu>{} : all, threads, !cpus);
    *out = new dso_context{std::make_shared<Context>(choose_kernels(isa), std::move(places), nodes == DSO_NODES_COPY)};
  });
}
int32_t dso_context_nodes(const dso_context* c, int32_t* threads, int32_t most) {
  if (!c) return 0;
  const std::vector<ThreadPlaces::Node>& nodes = c->shared->pool.places().nodes;
  for (int32_t i = 0; threads && i < std::min(most, int32_t(nodes.size())); ++i) threads[i] = nodes[size_t(i)].threads;
  return int32_t(nodes.size());
}
void dso_context_destroy(dso_context* c) { delete c; }  // plans created on it keep the shared context alive
const char* dso_context_isa(const dso_context* c) { return c ? c->shared->kernels.isa : nullptr; }
int32_t dso_context_threads(const dso_context* c) { return c ? c->shared->pool.threads() : 0; }
int32_t dso_context_set_checked(dso_context* c, int32_t on) {
  return guarded([&] { shared(c).checked = on != 0; });
}
int32_t dso_context_join(dso_context* c, dso_group* g) {
  return guarded([&] { shared(c).group = given(g, "group").shared; });
}

int32_t dso_group_create(int32_t fd, int32_t rank, int32_t ranks, dso_group** out) {
  return guarded([&] {
    given(out, "out") = nullptr;
    *out = new dso_group{std::make_shared<SharedGroup>(fd, rank, ranks)};
  });
}
int32_t dso_group_connect(const int32_t* data, const int32_t* alive, int32_t rank, int32_t ranks, dso_group** out) {
  return guarded([&] {
    given(out, "out") = nullptr;
    *out = new dso_group{std::make_shared<SocketGroup>(&given(data, "data"), &given(alive, "alive"), rank, ranks)};
  });
}
void dso_group_destroy(dso_group* g) { delete g; }  // contexts that joined it keep the shared group alive
int32_t dso_group_send(dso_group* g, const void* data, int64_t bytes) {
  return guarded([&] { given(g, "group").shared->send(&given(static_cast<const uint8_t*>(data), "data"), bytes); });
}
int32_t dso_group_receive(dso_group* g, void* data, int64_t bytes) {
  return guarded([&] { given(g, "group").shared->receive(&given(static_cast<uint8_t*>(data), "data"), bytes); });
}
int32_t dso_group_lose(dso_group* g, int32_t rank) {
  return guarded([&] { given(g, "group").shared->lose(rank); });
}
int32_t dso_group_lost(dso_group* g) { return g ? g->shared->look() : -1; }

int32_t dso_read_bandwidth(dso_context* c, int64_t bytes, double seconds, double* bytes_per_second) {
  return guarded([&] { given(bytes_per_second, "bytes_per_second") = read_bandwidth(shared(c), bytes, seconds); });
}

int32_t dso_read_bandwidth_of(dso_context* c, const void* const* starts, const int64_t* sizes, int32_t count, double seconds,
                              double* bytes_per_second) {
  return guarded([&] {
    double& result = given(bytes_per_second, "bytes_per_second");
    std::vector<MemoryRegion> regions;
    for (int32_t i = 0; i < count; ++i)
      regions.push_back({static_cast<const uint8_t*>((&given(starts, "starts"))[i]), (&given(sizes, "sizes"))[i]});
    result = read_bandwidth(shared(c), regions, seconds);
  });
}

int32_t dso_mapping_add(const void* address, int64_t bytes, int32_t fd, int64_t modified_ns, const char* name,
                        int64_t* number) {
  return guarded([&] {
    given(number, "number") = 0;
    *number = add_mapping(address, bytes, fd, modified_ns, name);
  });
}
void dso_mapping_remove(int64_t number) { remove_mapping(number); }
int32_t dso_mapping_check(const void* address) {
  return guarded([&] { check_intact(address); });
}

int64_t dso_tile_bytes(int32_t format) { return tile_bytes(format); }
int64_t dso_packed_bytes(int32_t format, int64_t rows, int64_t cols) { return packed_bytes(format, rows, cols); }
int64_t dso_row_bytes(int32_t slot_kind, int64_t width) { return row_bytes(slot_kind, width); }

int32_t dso_pack(dso_context* c, int32_t format, int32_t src_type, const void* src, int64_t rows, int64_t cols, int64_t stride,
                 const float* importance, void* dst) {
  return guarded([&] { pack(shared(c), format, src_type, src, rows, cols, stride, importance, dst); });
}
int32_t dso_pack_fp8(dso_context* c, const uint8_t* codes, const float* scales, int64_t rows, int64_t cols, int64_t stride,
                     void* dst) {
  return guarded([&] { pack_fp8(shared(c), codes, scales, rows, cols, stride, dst); });
}
int32_t dso_unpack(dso_context* c, const dso_weight* w, int64_t row_begin, int64_t row_end, float* dst) {
  return guarded([&] { unpack(shared(c), given(w, "weight"), row_begin, row_end, dst); });
}
int32_t dso_linear(dso_context* c, const dso_weight* w, const float* bias, int32_t activation, const float* x, int64_t T,
                   int64_t decode_rows, float* y) {
  return guarded([&] { linear(shared(c), given(w, "weight"), bias, activation, x, nullptr, T, decode_rows, y); });
}

int32_t dso_linear_rows(dso_context* c, const dso_weight* w, const float* bias, int32_t activation, const void* rows, int64_t T,
                        int64_t decode_rows, float* y) {
  return guarded([&] { linear(shared(c), given(w, "weight"), bias, activation, nullptr, rows, T, decode_rows, y); });
}
int32_t dso_norm(dso_context* c, const float* x, int64_t T, int64_t width, const float* weight, const float* bias, float eps,
                 float* y) {
  return guarded([&] { norm(shared(c), x, T, width, weight, bias, eps, y); });
}
int32_t dso_convert(dso_context* c, int32_t slot_kind, const float* x, int64_t T, int64_t width, void* rows) {
  return guarded([&] { convert(shared(c), slot_kind, x, T, width, rows); });
}

int64_t dso_cache_block_bytes(const dso_cache_shape* shape) {
  return result_or_code<int64_t>([&] { return cache_block_bytes(choose_kernels(nullptr), given(shape, "shape")); });
}
int32_t dso_cache_create(const dso_cache_shape* shape, int64_t blocks, dso_cache** out) {
  return guarded([&] {
    given(out, "out") = nullptr;
    *out = new dso_cache(choose_kernels(nullptr), given(shape, "shape"), blocks);
  });
}
void dso_cache_destroy(dso_cache* k) { delete k; }
int32_t dso_cache_copy_block(dso_cache* k, int32_t from, int32_t to) {
  return guarded([&] { given(k, "cache").copy_block(from, to); });
}
int32_t dso_cache_release(dso_cache* k, int32_t from_block) {
  return guarded([&] { given(k, "cache").release(from_block); });
}
int64_t dso_cache_saved_bytes(const dso_cache* k) { return k ? k->saved_bytes() : -1; }
int32_t dso_cache_save_block(const dso_cache* k, int32_t block, void* bytes) {
  return guarded([&] { given(k, "cache").save_block(block, &given(static_cast<uint8_t*>(bytes), "bytes")); });
}
int32_t dso_cache_load_block(dso_cache* k, int32_t block, const void* bytes) {
  return guarded([&] { given(k, "cache").load_block(block, &given(static_cast<const uint8_t*>(bytes), "bytes")); });
}
int32_t dso_cache_read(dso_cache* k, int32_t layer, const int32_t* block_table, int32_t tokens, float* key, float* value) {
  return guarded([&] { given(k, "cache").read(layer, block_table, tokens, key, value); });
}
int32_t dso_cache_rotate(dso_context* c, dso_cache* k, const dso_rotation* key, const dso_rotation* index, int32_t group,
                         const int32_t* block_table, int32_t tokens, int32_t position, int32_t delta) {
  return guarded(
      [&] { turn(shared(c), given(k, "cache"), given(key, "key"), index, group, block_table, tokens, position, delta); });
}

int64_t dso_states_slot_bytes(const dso_state_shape* shapes, int32_t n) {
  return result_or_code<int64_t>([&] { return states_slot_bytes(shapes, n); });
}
int32_t dso_states_create(const dso_state_shape* shapes, int32_t n, int64_t slots, dso_states** out) {
  return guarded([&] {
    given(out, "out") = nullptr;
    *out = new dso_states(shapes, n, slots);
  });
}
void dso_states_destroy(dso_states* s) { delete s; }
int32_t dso_states_copy(dso_states* s, int32_t from, int32_t to) {
  return guarded([&] { given(s, "states").copy(from, to); });
}
int32_t dso_states_release(dso_states* s, int32_t from_slot) {
  return guarded([&] { given(s, "states").release(from_slot); });
}
int32_t dso_states_save(const dso_states* s, int32_t slot, void* bytes) {
  return guarded([&] { given(s, "states").save(slot, &given(static_cast<uint8_t*>(bytes), "bytes")); });
}
int32_t dso_states_load(dso_states* s, int32_t slot, const void* bytes) {
  return guarded([&] { given(s, "states").load(slot, &given(static_cast<const uint8_t*>(bytes), "bytes")); });
}

int32_t dso_adapters_create(const dso_adapter_site* sites, int32_t n, int32_t slots, int32_t max_rank, dso_adapters** out) {
  return guarded([&] {
    given(out, "out") = nullptr;
    *out = new dso_adapters(sites, n, slots, max_rank);
  });
}
void dso_adapters_destroy(dso_adapters* a) { delete a; }
int32_t dso_adapters_set(dso_adapters* a, int32_t slot, int32_t site, const dso_weight* down, const dso_weight* up) {
  return guarded([&] { given(a, "adapters").set(slot, site, down, up); });
}

int32_t dso_plan_create(dso_context* c, const dso_step* steps, int32_t n_steps, const dso_slot* slots, int32_t n_slots,
                        const dso_weight* weights, int32_t n_weights, int32_t vocab_size, dso_plan** out) {
  return guarded([&] {
    given(out, "out") = nullptr;
    *out = new dso_plan(given(c, "context").shared, steps, n_steps, slots, n_slots, weights, n_weights, vocab_size);
  });
}
void dso_plan_destroy(dso_plan* p) { delete p; }
int64_t dso_plan_buffer_bytes(const dso_plan* p, int32_t T, int32_t R) {
  return p && T >= 0 && R >= 0 ? p->buffer_bytes(T, R) : -1;
}
int32_t dso_plan_reserve(dso_plan* p, int32_t T, int32_t R) {
  return guarded([&] { given(p, "plan").reserve(T, R); });
}
int32_t dso_plan_run(dso_plan* p, const dso_batch* batch) {
  return guarded([&] { given(p, "plan").run(given(batch, "batch")); });
}
int32_t dso_plan_check_batch(const dso_plan* p, const dso_batch* batch) {
  return guarded([&] { given(p, "plan").check_batch(given(batch, "batch")); });
}
int32_t dso_plan_decode(dso_plan* p, const dso_batch* batch, dso_decode* d) {
  return guarded([&] {
    dso_plan& plan = given(p, "plan");
    decode(plan, given(batch, "batch"), given(d, "decode"), [&](const dso_batch& step) { plan.run(step); });
  });
}
int32_t dso_plan_decode_stages(dso_plan* tail, const dso_batch* batch, dso_decode* d, dso_stages* stages) {
  return guarded(
      [&] { decode_stages(given(tail, "plan"), given(batch, "batch"), given(d, "decode"), given(stages, "stages")); });
}
int32_t dso_plan_follow(dso_plan* p, const dso_batch* batch, int32_t link) {
  return guarded([&] { follow(given(p, "plan"), given(batch, "batch"), link); });
}
int32_t dso_plan_decode_drafted(dso_plan* p, const dso_batch* batch, dso_plan* drafter, const dso_batch* pending,
                                dso_drafted_decode* d) {
  return guarded([&] {
    decode_drafted(given(p, "plan"), given(batch, "batch"), given(drafter, "drafter"), given(pending, "pending"),
                   given(d, "drafted"));
  });
}
int32_t dso_choose(dso_context* c, const float* logits, int32_t vocab, const dso_choice* choice, int32_t step,
                   const dso_mt19937* generator, int32_t* token) {
  return guarded([&] {
    given(token, "token") = choose(shared(c), &given(logits, "logits"), vocab, given(choice, "choice"), step, generator);
  });
}
int32_t dso_plan_check(const dso_plan* p) {
  return guarded([&] { given(p, "plan").check_weights(); });
}
int32_t dso_plan_counts(const dso_plan* p, dso_run_counts* out) {
  return guarded([&] { given(out, "out") = given(p, "plan").counts(); });
}
int32_t dso_plan_set_timing(dso_plan* p, int32_t on) {
  return guarded([&] { given(p, "plan").set_timing(on != 0); });
}
int32_t dso_plan_timing(const dso_plan* p, double* seconds_per_step, int64_t* runs) {
  return guarded([&] { given(p, "plan").timing(&given(seconds_per_step, "seconds_per_step"), &given(runs, "runs")); });
}

}  // extern "C"
