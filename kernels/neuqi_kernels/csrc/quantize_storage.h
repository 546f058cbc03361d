// Scales and zero-points as they are stored, rounded to their dtype; the twins are in neuqi_serve/quant/storage.py.
#pragma once

#include "scalar.h"

namespace neuqi {
namespace {

inline float smallest_normal(int kind) { return kind == kFloat16 ? 0x1p-14f : 0x1p-126f; }

inline float largest_finite(int kind) {
  return kind == kFloat16 ? 65504.0f : from_bits(kind == kBfloat16 ? 0x7F7F0000u : 0x7F7FFFFFu);
}

inline float rounded(float value, int kind) {
  if (kind == kFloat32) return value;
  return kind == kFloat16 ? half_to_float(float_to_half(value)) : bfloat_to_float(float_to_bfloat(value));
}

// Within the normal range of the dtype: no subnormals, no infinity.
inline float stored_scale(float scale, int kind) {
  const float low = smallest_normal(kind), high = largest_finite(kind);
  return rounded(scale < low ? low : scale > high ? high : scale, kind);
}

inline float stored_zero(float zero, int kind) {
  const float high = largest_finite(kind);
  // Adding 0 turns −0 into 0.
  return rounded(zero < -high ? -high : zero > high ? high : zero, kind) + 0.0f;
}

inline void minmax_params(float low, float high, float top, int kind, float& scale, float& zero) {
  scale = stored_scale((high - low) / top, kind);
  zero = stored_zero(-low / scale, kind);
}

// One value for all: its magnitude as the scale, and the code 1 or 0.
inline void constant_params(float value, int kind, float& scale, float& zero) {
  const float magnitude = value < 0.0f ? -value : value;
  scale = stored_scale(value == 0.0f ? 1.0f : magnitude, kind);
  zero = stored_zero((value > 0.0f ? 1.0f : 0.0f) - value / scale, kind);
}

}  // namespace
}  // namespace neuqi
