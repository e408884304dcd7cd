#include "states.hpp"

#include <cstring>

#include "error.hpp"
#include "layout.hpp"

namespace dso {
namespace {
constexpr int32_t kMostStates = 1 << 16, kMostSize = 1 << 20;
}  // namespace

int64_t state_bytes(const dso_state_shape& s) {
  for (int32_t n : {s.heads, s.rows, s.cols})
    if (n < 1 || n > kMostSize)
      fail(DSO_EINVAL, "states: a shape is {%d, %d, %d}, each must be from 1 to %d", s.heads, s.rows, s.cols, kMostSize);
  int64_t bytes;
  if (__builtin_mul_overflow(4 * int64_t(s.heads) * s.rows, round_up(s.cols, state_cols), &bytes) || bytes > (int64_t(1) << 40))
    fail(DSO_EINVAL, "states: a shape is {%d, %d, %d}, too large", s.heads, s.rows, s.cols);
  return bytes;
}

int64_t states_slot_bytes(const dso_state_shape* shapes, int32_t n) {
  if (n < 1 || n > kMostStates || !shapes) fail(DSO_EINVAL, "states: n is %d, out of range, or shapes is NULL", n);
  int64_t bytes = 0;
  for (int32_t i = 0; i < n; ++i) bytes += state_bytes(shapes[i]);
  return bytes;
}
}  // namespace dso

using namespace dso;

dso_states::dso_states(const dso_state_shape* given, int32_t n, int64_t n_slots)
    : slot_bytes(states_slot_bytes(given, n)), slots(n_slots), arena(bytes_of_parts("states", "slots", n_slots, slot_bytes)) {
  shapes.assign(given, given + n);
  int64_t at = 0;
  for (const dso_state_shape& s : shapes) {
    offsets.push_back(at);
    tile_floats.push_back(s.rows * state_cols);
    at += state_bytes(s);
  }
}

void dso_states::check_slot(int64_t slot) const {
  if (slot < 0 || slot >= slots)
    fail(DSO_EINVAL, "states: slot %lld does not exist, there are %lld slots", (long long)slot, (long long)slots);
}

void dso_states::copy(int64_t from, int64_t to) {
  check_slot(from);
  check_slot(to);
  if (from != to) std::memcpy(arena.data() + to * slot_bytes, arena.data() + from * slot_bytes, slot_bytes);
}

void dso_states::release(int64_t from_slot) {
  if (from_slot < 0 || from_slot > slots)
    fail(DSO_EINVAL, "states: cannot release from slot %lld, there are %lld slots", (long long)from_slot, (long long)slots);
  arena.release(from_slot * slot_bytes);
}

void dso_states::save(int64_t slot, uint8_t* bytes) const {
  check_slot(slot);
  std::memcpy(bytes, arena.data() + slot * slot_bytes, slot_bytes);
}

void dso_states::load(int64_t slot, const uint8_t* bytes) {
  check_slot(slot);
  std::memcpy(arena.data() + slot * slot_bytes, bytes, slot_bytes);
}
