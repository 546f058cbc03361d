// Activations in fixed point, exact to the last bit on every CPU.
//
// The activations of one token over a segment of at most 128 input features share a power of two: x ≈ v·2^-e with whole
// numbers v of 15 bits and a sign (bfloat16) or of 21 bits and a sign (float16, float32), in two or three bytes of
// signed digits to the base 256. A byte product with the codes then sums exactly in int32. The power is the largest that
// lets the largest activation of the segment fit, so an activation is off by at most 2^-15 (2^-21) of the largest one's
// power of two; bfloat16 values down to 1/128 of it are exact. That is below what the rounding of the result to its
// dtype costs.
#pragma once

#include <algorithm>
#include <cstring>

#include "layout.h"
#include "scalar.h"

namespace neuqi {
namespace {

constexpr int parts_of(int kind) { return kind == kBfloat16 ? 2 : 3; }

// Largest v whose digits are all within a signed byte, and the bit that the largest activation reaches.
constexpr float kLargestTwoParts = 127 * 256 + 127;
constexpr float kLargestThreeParts = 1 << 22;
constexpr int kTopBitTwoParts = 14, kTopBitThreeParts = 21;
// Smallest positive float32 is 2^-149.
constexpr int kMostShift = 149;
constexpr float kRoundingShift = 12582912.0f;

inline float power_of_two(int exponent) { return from_bits(uint32_t(exponent + 127) << 23); }

inline int floor_log2(uint32_t magnitude_bits) {
  const int exponent = int(magnitude_bits >> 23);
  return exponent ? exponent - 127 : 31 - __builtin_clz(magnitude_bits) - kMostShift;
}

inline void load_floats(const void* x, int64_t index, int kind, int64_t count, float* values) {
  if (kind == kFloat32) {
    std::memcpy(values, static_cast<const float*>(x) + index, size_t(count) * 4);
    return;
  }
  const uint16_t* halves = static_cast<const uint16_t*>(x) + index;
  if (kind == kBfloat16)
    for (int64_t i = 0; i < count; ++i) values[i] = bfloat_to_float(halves[i]);
  else
    for (int64_t i = 0; i < count; ++i) values[i] = half_to_float(halves[i]);
}

// Writes the digits of one segment of one token to `xs[(quad·P + part)·rows]`, most significant part first, four input
// features in each word; 2^-e to `step` and Σ v to `sum`. Returns false where an activation is not finite: then all
// digits are zero.
template <int P>
bool prepare_segment(const void* x, int64_t index, int kind, int64_t segment, int64_t rows, int32_t* xs, float* step,
                     float* sum) {
  alignas(64) float values[kMostSegment];
  alignas(64) int32_t whole[kMostSegment];
  alignas(64) int8_t digits[P][kMostSegment];
  load_floats(x, index, kind, segment, values);
  uint32_t largest = 0;
  for (int64_t i = 0; i < segment; ++i) largest = std::max(largest, to_bits(values[i]) & 0x7FFFFFFF);
  const bool finite = largest < 0x7F800000;
  if (!finite || largest == 0) {
    for (int64_t i = 0; i < segment / 4 * P; ++i) xs[i * rows] = 0;
    *step = *sum = 0;
    return finite;
  }
  int shift = std::min((P == 2 ? kTopBitTwoParts : kTopBitThreeParts) - floor_log2(largest), kMostShift);
  // In two steps, as 2^149 is no float32.
  float up = power_of_two(shift / 2), rest = power_of_two(shift - shift / 2);
  if (P == 2 && from_bits(largest) * up * rest > kLargestTwoParts) {
    --shift;
    rest *= 0.5f;
  }
  int32_t total = 0;
  for (int64_t i = 0; i < segment; ++i) {
    // Adding 1.5·2^23 leaves the nearest whole number in the low bits, halfway cases to even.
    whole[i] = int32_t(to_bits(values[i] * up * rest + kRoundingShift) - to_bits(kRoundingShift));
    total += whole[i];
  }
  for (int part = P - 1; part > 0; --part)
    for (int64_t i = 0; i < segment; ++i) {
      digits[part][i] = int8_t(whole[i]);
      whole[i] = (whole[i] - digits[part][i]) >> 8;
    }
  for (int64_t i = 0; i < segment; ++i) digits[0][i] = int8_t(whole[i]);
  for (int64_t quad = 0; quad < segment / 4; ++quad)
    for (int part = 0; part < P; ++part) std::memcpy(xs + (quad * P + part) * rows, digits[part] + 4 * quad, 4);
  *step = power_of_two(-(shift / 2)) * power_of_two(-(shift - shift / 2));
  *sum = float(total);
  return true;
}

}  // namespace
}  // namespace neuqi
