// Slots for recurrent states: `slots` slots in one range of address space. A slot holds one fp32 state of each shape, in tiles
// of state_cols columns, so that a kernel works on a contiguous tile.
#pragma once
#include <cstdint>
#include <vector>

#include "arena.hpp"
#include "dso.h"

struct dso_states {
  dso_states(const dso_state_shape* shapes, int32_t n, int64_t slots);

  void copy(int64_t from, int64_t to);
  void release(int64_t from_slot);
  void save(int64_t slot, uint8_t* bytes) const;
  void load(int64_t slot, const uint8_t* bytes);

  // Tile of a slot's state; the tiles of a head follow each other, and so do the heads.
  float* tile(int64_t slot, int64_t state, int64_t index) const {
    return reinterpret_cast<float*>(arena.data() + slot * slot_bytes + offsets[state]) + index * tile_floats[state];
  }

  std::vector<dso_state_shape> shapes;
  std::vector<int64_t> offsets, tile_floats;  // bytes from the start of a slot; floats per tile
  int64_t slot_bytes = 0;
  const int64_t slots;
  dso::Arena arena;

 private:
  void check_slot(int64_t slot) const;
};

namespace dso {
int64_t state_bytes(const dso_state_shape& shape);  // DSO_EINVAL for an invalid shape
int64_t states_slot_bytes(const dso_state_shape* shapes, int32_t n);
}  // namespace dso
