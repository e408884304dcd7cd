// Loads and stores elements in memory, fp32 or bf16 (uint16_t here), as lanes: up to 16 at a time, without touching memory past
// the last element.
#pragma once

namespace dso::DSO_ISA_NAMESPACE {

template <class T>
DSO_INLINE int64_t fewer(int64_t n) {
  return n < 16 ? n * (int64_t)sizeof(T) : 16 * (int64_t)sizeof(T);
}

DSO_INLINE F load_some(const float* p, int64_t n) { return n >= 16 ? load(p) : load(p, n); }
DSO_INLINE F load_some(const uint16_t* p, int64_t n) {
  if (n >= 16) return load_bf16(p);
  uint16_t few[16] = {};
  memcpy(few, p, (size_t)fewer<uint16_t>(n));
  return load_bf16(few);
}
DSO_INLINE void store_some(uint16_t* p, F x, int64_t n) {
  if (n >= 16) return store_bf16(p, x);
  uint16_t few[16];
  store_bf16(few, x);
  memcpy(p, few, (size_t)fewer<uint16_t>(n));
}

// The 32 random bits of an element: "lowbias32" by Hoang and Wellons with a key at each end. The same as in
// train/ops/random_bits.py.
DSO_INLINE I random_bits(int64_t element, uint32_t key, uint32_t second) {
  I x = iadd(iadd(count_up(), iset((int32_t)(uint32_t)element)), iset((int32_t)key));
  x = imul(ixor(x, shr<16>(x)), iset(0x7feb352d));
  x = iadd(x, iset((int32_t)second));
  x = imul(ixor(x, shr<15>(x)), iset((int32_t)0x846ca68b));
  return ixor(x, shr<16>(x));
}

// Stochastic rounding to bf16 with 16 random bits: rounds up with the probability of the discarded fraction, so that the
// expected value is x. NaN and infinity are preserved.
DSO_INLINE F round_by_chance(F x, I sixteen) {
  return where_nan(x, x, from_bits(iand(iadd(bits(x), sixteen), iset((int32_t)0xffff0000))));
}
DSO_INLINE void store_upper(uint16_t* p, F x, int64_t n) {  // for values that are bf16 already; a NaN keeps its upper half
  if (n >= 16) return store_16(p, shr<16>(bits(x)));
  uint16_t few[16];
  store_16(few, shr<16>(bits(x)));
  memcpy(p, few, (size_t)fewer<uint16_t>(n));
}

}  // namespace dso::DSO_ISA_NAMESPACE
