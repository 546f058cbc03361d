// NEON with the byte dot product of ARMv8.2.
#pragma once

#include <arm_neon.h>

#include "experts.h"

namespace neuqi {
namespace {

struct Neon {
  using Codes = uint8x16_t;
  using Digits = int8x16_t;
  using Sums = int32x4_t;
  using Floats = float32x4_t;
  static constexpr int kLanes = 4;

  // Rows and vectors of a kernel: 24 sums leave eight of the 32 registers for codes, digits and masks.
  static constexpr int vectors(int rows, int parts) { return rows * parts <= 3 ? 4 : 2; }
  static constexpr int most_rows(int parts) { return parts == 2 ? 6 : 4; }

  static void pause() { asm volatile("yield"); }

  static NEUQI_INLINE Codes load(const uint8_t* from) { return vld1q_u8(from); }
  template <int S>
  static NEUQI_INLINE Codes shift_right(Codes codes) {
    if constexpr (S == 0)
      return codes;
    else
      return vshrq_n_u8(codes, S);
  }
  static NEUQI_INLINE Codes mask(Codes codes, int byte) { return vandq_u8(codes, vdupq_n_u8(uint8_t(byte))); }
  static NEUQI_INLINE Codes either(Codes a, Codes b) { return vorrq_u8(a, b); }

  static NEUQI_INLINE Digits broadcast(const int32_t* x) { return vreinterpretq_s8_s32(vdupq_n_s32(*x)); }
  static NEUQI_INLINE Sums no_sums() { return vdupq_n_s32(0); }
  // `W`: the codes have more than four bits.
  template <bool W>
  static NEUQI_INLINE Sums dot(Sums sums, Codes codes, Digits digits) {
    // The instruction takes signed bytes, for which the top bit counts −128 instead of 128.
    if constexpr (W)
      return vsubq_s32(dot<false>(sums, mask(codes, 0x7F), digits), dot<false>(no_sums(), mask(codes, 0x80), digits));
    else
      return vdotq_s32(sums, vreinterpretq_s8_u8(codes), digits);
  }
  static NEUQI_INLINE void keep_in_register(Sums& sums) { asm volatile("" : "+w"(sums)); }
  static NEUQI_INLINE Sums shift_left_8(Sums sums) { return vshlq_n_s32(sums, 8); }
  static NEUQI_INLINE Sums add(Sums a, Sums b) { return vaddq_s32(a, b); }

  static NEUQI_INLINE Floats to_floats(Sums sums) { return vcvtq_f32_s32(sums); }
  static NEUQI_INLINE Floats all(float value) { return vdupq_n_f32(value); }
  static NEUQI_INLINE Floats load(const float* from) { return vld1q_f32(from); }
  static NEUQI_INLINE void store(float* to, Floats values) { vst1q_f32(to, values); }
  static NEUQI_INLINE Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
  static NEUQI_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  // a − b·c.
  static NEUQI_INLINE Floats subtract_product(Floats a, Floats b, Floats c) { return vfmsq_f32(a, b, c); }

  static NEUQI_INLINE Floats load_floats(const void* data, int64_t index, int kind) {
    if (kind == kFloat32) return vld1q_f32(static_cast<const float*>(data) + index);
    const uint16x4_t half = vld1_u16(static_cast<const uint16_t*>(data) + index);
    if (kind == kFloat16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
  }
};

}  // namespace
}  // namespace neuqi
