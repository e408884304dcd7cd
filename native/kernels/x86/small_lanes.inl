// Lane operations on 128 and 256 bits, which both AVX2 and AVX-512 have. Included by their lanes.hpp, inside its namespace.
DSO_INLINE float from_f16(uint16_t x) { return _cvtsh_ss(x); }
DSO_INLINE uint16_t to_f16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }  // half to even
DSO_INLINE void to_f16(const float* x, uint16_t* h) {                                    // 16 values, half to even
  for (int i = 0; i < 16; i += 8)
    _mm_storeu_si128((__m128i*)(h + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
}
// The block of 4 x 4 at row r and column c of in[rows][cols], to out[cols][rows].
template <int rows, int cols>
DSO_INLINE void transpose4(const float* a, float* b, int r, int c) {
  __m128 x0 = _mm_loadu_ps(a + r * cols + c), x1 = _mm_loadu_ps(a + (r + 1) * cols + c);
  __m128 x2 = _mm_loadu_ps(a + (r + 2) * cols + c), x3 = _mm_loadu_ps(a + (r + 3) * cols + c);
  _MM_TRANSPOSE4_PS(x0, x1, x2, x3);
  _mm_storeu_ps(b + c * rows + r, x0);
  _mm_storeu_ps(b + (c + 1) * rows + r, x1);
  _mm_storeu_ps(b + (c + 2) * rows + r, x2);
  _mm_storeu_ps(b + (c + 3) * rows + r, x3);
}
// scale * (byte - offset) of a word's 4 bytes, with `least` added if has_min.
struct ByteScale {
  __m128 scale, least;
  __m128i offset;
};
DSO_INLINE ByteScale byte_scale(float scale, float least, int32_t offset) {
  return {_mm_set1_ps(scale), _mm_set1_ps(least), _mm_set1_epi32(offset)};
}
template <bool has_min>
DSO_INLINE void scale_bytes(const ByteScale& by, uint32_t word, float* out) {
  const __m128i code = _mm_sub_epi32(_mm_cvtepu8_epi32(_mm_cvtsi32_si128((int32_t)word)), by.offset);
  const __m128 w = _mm_mul_ps(by.scale, _mm_cvtepi32_ps(code));
  _mm_storeu_ps(out, has_min ? _mm_add_ps(w, by.least) : w);
}
