// AVX-512 (F, BW, VL, DQ), with or without the byte dot product of VNNI.
#pragma once

#include <immintrin.h>

#include "experts.h"

namespace neuqi {
namespace {

struct Avx512 {
  using Codes = __m512i;
  using Digits = __m512i;
  using Sums = __m512i;
  using Floats = __m512;
  static constexpr int kLanes = 16;

  // Rows and vectors of a kernel: at least eight independent sums hide the latency of the dot product, and 24 leave
  // registers for the rest.
  static constexpr int vectors(int rows, int parts) { return rows * parts <= 4 ? 4 : 2; }
  static constexpr int most_rows(int parts) { return parts == 2 ? 6 : 4; }

  static void pause() { _mm_pause(); }

  static NEUQI_INLINE Codes load(const uint8_t* from) { return _mm512_loadu_si512(from); }
  template <int S>
  static NEUQI_INLINE Codes shift_right(Codes codes) {
    return S ? _mm512_srli_epi16(codes, S) : codes;
  }
  static NEUQI_INLINE Codes mask(Codes codes, int byte) {
    return _mm512_and_si512(codes, _mm512_set1_epi8(char(byte)));
  }
  static NEUQI_INLINE Codes either(Codes a, Codes b) { return _mm512_or_si512(a, b); }

  static NEUQI_INLINE Digits broadcast(const int32_t* x) { return _mm512_set1_epi32(*x); }
  static NEUQI_INLINE Sums no_sums() { return _mm512_setzero_si512(); }
  // `W`: the codes have more than four bits.
  template <bool W>
  static NEUQI_INLINE Sums dot(Sums sums, Codes codes, Digits digits) {
#ifdef NEUQI_DOT
    return NEUQI_DOT(sums, codes, digits);
#else
    // Products of wider codes in pairs leave 16 bits: they go in two halves.
    if constexpr (W) {
      const Codes high = mask(_mm512_srli_epi16(codes, 4), 0x0F);
      return _mm512_add_epi32(dot<false>(sums, mask(codes, 0x0F), digits),
                              _mm512_slli_epi32(dot<false>(no_sums(), high, digits), 4));
    }
    const __m512i pairs = _mm512_maddubs_epi16(codes, digits);
    return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
  }
  static NEUQI_INLINE void keep_in_register(Sums& sums) { asm volatile("" : "+v"(sums)); }
  static NEUQI_INLINE Sums shift_left_8(Sums sums) { return _mm512_slli_epi32(sums, 8); }
  static NEUQI_INLINE Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }

  static NEUQI_INLINE Floats to_floats(Sums sums) { return _mm512_cvtepi32_ps(sums); }
  static NEUQI_INLINE Floats all(float value) { return _mm512_set1_ps(value); }
  static NEUQI_INLINE Floats load(const float* from) { return _mm512_load_ps(from); }
  static NEUQI_INLINE void store(float* to, Floats values) { _mm512_store_ps(to, values); }
  static NEUQI_INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static NEUQI_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  // a − b·c.
  static NEUQI_INLINE Floats subtract_product(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(b, c, a); }

  static NEUQI_INLINE Floats load_floats(const void* data, int64_t index, int kind) {
    if (kind == kFloat32) return _mm512_loadu_ps(static_cast<const float*>(data) + index);
    const auto* half = reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(data) + index);
    if (kind == kFloat16) return _mm512_cvtph_ps(_mm256_loadu_si256(half));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(half)), 16));
  }
};

}  // namespace
}  // namespace neuqi
