// The inner loops of integer products, each in a function of its own, for `benchmarks/dot_instructions.py`, which compiles this
// file for one variant (DSO_LANES: its lanes; DSO_PANELS: its panels, if it has some) and counts their instructions.
#include DSO_LANES
#ifdef DSO_PANELS
#include DSO_PANELS
#endif
#include "../kernels/kernels.hpp"
#include "dso.h"
#include "../kernels/generic/math.hpp"
// After math.hpp, whose names they use.
#include "../kernels/generic/convert.hpp"
#include "../kernels/generic/linear_int.hpp"

namespace dso::DSO_ISA_NAMESPACE {

// One tile row of M tokens, reading packed weights; a group of 32 columns x 16 outputs an iteration.
template <int format, int M>
static void packed(const Matrix& w, const Output& out, const Rows<DSO_SLOT_Q8>& x) {
  Stream fetch;
  block<format, DSO_SLOT_Q8, M, 1>(w, out, x, 0, 0, fetch);
}

#define DSO_LOOP(name, format, tokens)                                                            \
  extern "C" __attribute__((visibility("default"))) void name(const Matrix& w, const Output& out, \
                                                              const Rows<DSO_SLOT_Q8>& x) {       \
    packed<format, tokens>(w, out, x);                                                            \
  }
DSO_LOOP(int4_1, DSO_INT4, 1)
DSO_LOOP(int4_4, DSO_INT4, 4)
DSO_LOOP(int8_1, DSO_INT8, 1)
DSO_LOOP(int8_4, DSO_INT8, 4)

#ifdef DSO_OWN_PANELS
#define DSO_PANEL_LOOP(name, format)                                                                   \
  extern "C" __attribute__((visibility("default"))) void name(const uint8_t* panel, const Output& out, \
                                                              const Rows<DSO_SLOT_Q8>& x) {            \
    panel_block<Panel<format>, DSO_SLOT_Q8, 4, 1>(panel, out, x, 0, 0, 0, x.width / 32);               \
  }
DSO_PANEL_LOOP(int4_panel, DSO_INT4)
DSO_PANEL_LOOP(int8_panel, DSO_INT8)
#endif
}  // namespace dso::DSO_ISA_NAMESPACE
