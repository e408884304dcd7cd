// Defines this variant's TrainAttention; included once, after its lanes. As in linear.inl: nothing from the standard library
// that emits code. A variant with tile registers also includes its tiles, and defines DSO_TILES.
#include "dense_attention.hpp"
#include "dense_blocks.hpp"
#include "train_attention_backward.hpp"
#include "train_attention_forward.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace {

int64_t forward_scratch(const TrainAttnTask& t) {
  return t.type == DSO_TYPE_BF16 ? ForwardRoom<NarrowProduct>(t, nullptr).bytes : ForwardRoom<WideProduct>(t, nullptr).bytes;
}
int64_t backward_scratch(const TrainAttnTask& t) {
  return t.type == DSO_TYPE_BF16 ? BackwardRoom<NarrowProduct>(t, nullptr).bytes : BackwardRoom<WideProduct>(t, nullptr).bytes;
}
void forward(const TrainAttnTask& t, uint8_t* scratch) {
  if (t.bidirectional)
    attn_forward<float, WideProduct, BidirectionalMask>(t, scratch);
  else if (t.type == DSO_TYPE_BF16)
    attn_forward<uint16_t, NarrowProduct, Mask>(t, scratch);
  else
    attn_forward<float, WideProduct, Mask>(t, scratch);
}
void backward(const TrainAttnTask& t, uint8_t* scratch) {
  if (t.type == DSO_TYPE_BF16)
    attn_backward<uint16_t, NarrowProduct>(t, scratch);
  else
    attn_backward<float, WideProduct>(t, scratch);
}
int64_t dense_scratch(const DenseAttnTask& t) {
  if (t.queries <= dense_attn_rows) return DenseRoom(t, nullptr).bytes;
  return t.type == DSO_TYPE_BF16 || t.rounded ? dense_blocks_scratch<NarrowProduct>(t) : dense_blocks_scratch<WideProduct>(t);
}
void dense(const DenseAttnTask& t, uint8_t* scratch) {
  if (t.queries > dense_attn_rows && t.type == DSO_TYPE_BF16)
    dense_blocks<uint16_t, NarrowProduct>(t, scratch);
  else if (t.queries > dense_attn_rows)
    t.rounded ? dense_blocks<float, NarrowProduct>(t, scratch) : dense_blocks<float, WideProduct>(t, scratch);
  else if (t.type == DSO_TYPE_BF16)
    dense_attention<uint16_t>(t, scratch);
  else
    dense_attention<float>(t, scratch);
}

}  // namespace

extern const TrainAttention train_attention;  // `extern`, because a const object would otherwise be local to this unit
const TrainAttention train_attention = {forward_scratch, backward_scratch, forward, backward, query_grad, dense_scratch, dense};
}  // namespace dso::DSO_ISA_NAMESPACE
