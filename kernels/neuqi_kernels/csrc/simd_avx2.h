// AVX2 with FMA and F16C, with or without the byte dot product of AVX-VNNI.
#pragma once

#include <immintrin.h>

#include "experts.h"

namespace neuqi {
namespace {

struct Avx2 {
  using Codes = __m256i;
  using Digits = __m256i;
  using Sums = __m256i;
  using Floats = __m256;
  static constexpr int kLanes = 8;

  // Rows and vectors of a kernel: sixteen registers hold eight sums, the codes they need, the digits and a mask.
  static constexpr int vectors(int rows, int parts) {
    return rows * parts <= 2 ? 4 : rows * parts <= 4 ? 2 : 1;
  }
  static constexpr int most_rows(int) { return 4; }

  static void pause() { _mm_pause(); }

  static NEUQI_INLINE Codes load(const uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  template <int S>
  static NEUQI_INLINE Codes shift_right(Codes codes) {
    return S ? _mm256_srli_epi16(codes, S) : codes;
  }
  static NEUQI_INLINE Codes mask(Codes codes, int byte) {
    return _mm256_and_si256(codes, _mm256_set1_epi8(char(byte)));
  }
  static NEUQI_INLINE Codes either(Codes a, Codes b) { return _mm256_or_si256(a, b); }

  static NEUQI_INLINE Digits broadcast(const int32_t* x) { return _mm256_set1_epi32(*x); }
  static NEUQI_INLINE Sums no_sums() { return _mm256_setzero_si256(); }
  // `W`: the codes have more than four bits.
  template <bool W>
  static NEUQI_INLINE Sums dot(Sums sums, Codes codes, Digits digits) {
#ifdef NEUQI_DOT
    return NEUQI_DOT(sums, codes, digits);
#else
    // Products of wider codes in pairs leave 16 bits: they go in two halves.
    if constexpr (W) {
      const Codes high = mask(_mm256_srli_epi16(codes, 4), 0x0F);
      return _mm256_add_epi32(dot<false>(sums, mask(codes, 0x0F), digits),
                              _mm256_slli_epi32(dot<false>(no_sums(), high, digits), 4));
    }
    const __m256i pairs = _mm256_maddubs_epi16(codes, digits);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
  }
  static NEUQI_INLINE void keep_in_register(Sums& sums) { asm volatile("" : "+x"(sums)); }
  static NEUQI_INLINE Sums shift_left_8(Sums sums) { return _mm256_slli_epi32(sums, 8); }
  static NEUQI_INLINE Sums add(Sums a, Sums b) { return _mm256_add_epi32(a, b); }

  static NEUQI_INLINE Floats to_floats(Sums sums) { return _mm256_cvtepi32_ps(sums); }
  static NEUQI_INLINE Floats all(float value) { return _mm256_set1_ps(value); }
  static NEUQI_INLINE Floats load(const float* from) { return _mm256_load_ps(from); }
  static NEUQI_INLINE void store(float* to, Floats values) { _mm256_store_ps(to, values); }
  static NEUQI_INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static NEUQI_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  // a − b·c.
  static NEUQI_INLINE Floats subtract_product(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(b, c, a); }

  static NEUQI_INLINE Floats load_floats(const void* data, int64_t index, int kind) {
    if (kind == kFloat32) return _mm256_loadu_ps(static_cast<const float*>(data) + index);
    const __m128i half =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(data) + index));
    if (kind == kFloat16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
};

}  // namespace
}  // namespace neuqi
