// 16-bit floating-point numbers without hardware support; static, because each file is compiled for another CPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "layout.h"

namespace neuqi {
namespace {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float half_to_float(uint16_t half) {
  // The exponent field is moved as it is; the product with 2^112 corrects its bias, for subnormals too.
  float magnitude = from_bits(uint32_t(half & 0x7FFF) << 13) * 0x1p112f;
  uint32_t special = (half & 0x7C00) == 0x7C00 ? 0x7F800000u : 0u;
  return from_bits(to_bits(magnitude) | special | uint32_t(half & 0x8000) << 16);
}

inline float bfloat_to_float(uint16_t bits) { return from_bits(uint32_t(bits) << 16); }

inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = to_bits(value), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? bits >> 16 | 0x40 : rounded);
}

inline uint16_t float_to_half(float value) {
  uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return uint16_t(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return uint16_t(sign | 0x7C00);
  if (magnitude < 0x38800000) {
    // Adding 0.5 leaves the subnormal, rounded to nearest even, in the low bits.
    return uint16_t(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3F000000));
  }
  return uint16_t(sign | (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13);
}

inline float load_scalar(const void* data, int64_t index, int kind) {
  if (kind == kFloat32) return static_cast<const float*>(data)[index];
  uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return kind == kFloat16 ? half_to_float(bits) : bfloat_to_float(bits);
}

inline void store_scalar(void* data, int64_t index, int kind, float value) {
  if (kind == kFloat32)
    static_cast<float*>(data)[index] = value;
  else
    static_cast<uint16_t*>(data)[index] = kind == kFloat16 ? float_to_half(value) : float_to_bfloat(value);
}

}  // namespace
}  // namespace neuqi
