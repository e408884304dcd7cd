#include "mapped_files.hpp"

#include <atomic>
#include <cerrno>
#include <memory>
#include <mutex>
#include <string>

#include "error.hpp"
#include "faults.hpp"
#include "files.hpp"
#include "memory.hpp"
#include "threads.hpp"

namespace dso {
namespace {

enum State : int32_t { kIntact = 0, kLost = 1, kWritten = 2 };

// Never freed, only reused: the handler walks the list without a lock. It reads the atomic fields and `next`; the others are
// protected by the mutex.
struct Mapping {
  std::atomic<uint32_t> version{0};  // odd while the next three fields change
  std::atomic<int64_t> number{0};    // 0: free
  std::atomic<uintptr_t> begin{0}, end{0};
  std::atomic<int32_t> state{kIntact};
  Mapping* next = nullptr;

  int fd = -1;
  int64_t bytes = 0, modified_ns = 0;
  std::string name;
};

std::atomic<Mapping*> mappings{nullptr};
std::atomic<int32_t> live{0};

std::mutex& mutex() {
  static std::mutex* const made = [] {
    auto* const m = new std::mutex;  // never destroyed: mappings may be removed while the process exits
    // So that a child does not inherit a locked mutex.
    at_fork([] { mutex().lock(); }, [] { mutex().unlock(); }, [] { mutex().unlock(); });
    return m;
  }();
  return *made;
}

void place(Mapping& m, int64_t number, uintptr_t begin, uintptr_t end) {
  m.version.fetch_add(1);
  m.number.store(number);
  m.begin.store(begin);
  m.end.store(end);
  m.version.fetch_add(1);
}

// ---- the handler: nothing here locks or allocates

struct Range {
  Mapping* mapping = nullptr;
  int64_t number = 0;
  uintptr_t begin = 0, end = 0;
};

// The newest mapping that contains this address: an old one may be removed only after it was unmapped.
Range find(const void* address) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  Range found;
  for (Mapping* m = mappings.load(); m; m = m->next) {
    const uint32_t version = m->version.load();
    const Range r{m, m->number.load(), m->begin.load(), m->end.load()};
    if (version % 2 == 0 && m->version.load() == version && r.begin <= at && at < r.end && r.number > found.number) found = r;
  }
  return found;
}

bool replace_by_zeros(void* address) {
  const Range r = find(address);
  if (!r.mapping) return false;
  r.mapping->state.store(kLost);  // first: a thread that reads zeros must see this state
  return map_zeros(r.begin, r.end);
}

// ---- the functions below hold the mutex

void install() { handle_faults(replace_by_zeros); }

// Checks the file; a detected change is permanent.
int32_t look(Mapping& m) {
  FileState s;
  if (m.state.load() == kIntact && m.fd >= 0) {
    int32_t found = kIntact, intact = kIntact;
    if (!state_of_file(m.fd, s) || s.bytes < m.bytes)
      found = kLost;
    else if (s.bytes != m.bytes || s.modified_ns != m.modified_ns)
      found = kWritten;
    if (found != kIntact) m.state.compare_exchange_strong(intact, found);
  }
  return m.state.load();
}

}  // namespace

int64_t add_mapping(const void* address, int64_t bytes, int fd, int64_t modified_ns, const char* name) {
  if (!address || bytes < 1 || !name) fail(DSO_EINVAL, "invalid mapping: %lld bytes at %p", (long long)bytes, address);
  const int own = fd < 0 ? -1 : duplicate_file(fd);
  if (fd >= 0 && own < 0) fail(DSO_EINVAL, "%s: its file descriptor cannot be duplicated (error %d)", name, errno);
  std::lock_guard lock(mutex());
  Mapping* m = mappings.load();
  while (m && m->number.load() != 0) m = m->next;
  if (!m) {
    m = new Mapping;
    m->next = mappings.load();
    mappings.store(m);
  }
  static int64_t numbers = 0;
  m->fd = own, m->bytes = bytes, m->modified_ns = modified_ns, m->name = name;
  m->state.store(kIntact);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address), page = uintptr_t(page_bytes());
  place(*m, ++numbers, begin / page * page, (begin + bytes + page - 1) / page * page);
  live.fetch_add(1);
  install();
  return numbers;
}

void remove_mapping(int64_t number) {
  std::lock_guard lock(mutex());
  for (Mapping* m = mappings.load(); m; m = m->next) {
    if (number == 0 || m->number.load() != number) continue;
    place(*m, 0, 0, 0);
    if (m->fd >= 0) close_file(m->fd);
    m->fd = -1;
    live.fetch_sub(1);
    return;
  }
}

const void* mapping_of(const void* address) {
  if (live.load() == 0) return nullptr;
  std::lock_guard lock(mutex());
  return reinterpret_cast<const void*>(find(address).begin);
}

void check_intact(const void* address) {
  if (live.load() == 0) return;
  std::lock_guard lock(mutex());
  Mapping* const m = find(address).mapping;
  if (!m) return;
  switch (look(*m)) {
    case kLost:
      fail(DSO_EFILE, "was cut short or cannot be read while its weights are in use: %s", m->name.c_str());
    case kWritten:
      fail(DSO_EFILE, "was written to while its weights are in use: %s", m->name.c_str());
  }
}

void keep_handler() {
  if (live.load() == 0) return;
  std::lock_guard lock(mutex());
  install();
}

}  // namespace dso
