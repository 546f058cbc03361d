#include "gated.h"

#include <algorithm>
#include <limits>

#include "scalar.h"

namespace neuqi {
namespace {

// Adding 1.5·2^23 leaves the nearest whole number in the low bits.
constexpr float kRoundingShift = 12582912.0f;
constexpr float kLargestExponent = 88.7228f, kSmallestExponent = -87.3365f;
// ln 2 in two parts, of which the first has trailing zeros: products with whole numbers of ten bits are exact.
constexpr float kLog2E = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;

// e^x, a few units in the last place off; plain operations, so that the compiler makes vectors of it.
inline float exponential(float x) {
  const float bounded = x < kSmallestExponent ? kSmallestExponent : x > kLargestExponent ? kLargestExponent : x;
  const float shifted = bounded * kLog2E + kRoundingShift, n = shifted - kRoundingShift;
  const float r = bounded - n * kLn2High - n * kLn2Low;
  // Taylor's series, whose remainder for |r| <= ln 2 / 2 is below 2^-26.
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two factors, as 2^128 is no float32.
  const int32_t power = int32_t(to_bits(shifted) - to_bits(kRoundingShift)), half = power >> 1;
  const float value = p * from_bits(uint32_t(half + 127) << 23) * from_bits(uint32_t(power - half + 127) << 23);
  return x > kLargestExponent ? std::numeric_limits<float>::infinity() : x < kSmallestExponent ? 0.0f : value;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// The error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
inline float error_function(float x) {
  const float size = x < 0 ? -x : x, t = 1.0f / (1.0f + 0.3275911f * size);
  const float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  const float value = 1.0f - p * exponential(-size * size);
  return x < 0 ? -value : value;
}

template <int A>
inline float activation_value(float g, float up) {
  if constexpr (A == kSilu) return g * sigmoid(g) * up;
  if constexpr (A == kGelu) return 0.5f * g * (1.0f + error_function(g * 0.70710678f)) * up;
  // tanh(t) = 2·sigmoid(2t) − 1.
  if constexpr (A == kGeluTanh) return g * sigmoid(1.59576912f * (g + 0.044715f * g * g * g)) * up;
  const float gate = g > 7.0f ? 7.0f : g, linear = up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up;
  return gate * sigmoid(1.702f * gate) * (linear + 1.0f);
}

template <int A>
void gate_all(const float* gates, const float* ups, int64_t stride, int64_t count, float* h) {
  for (int64_t i = 0; i < count; ++i) h[i] = activation_value<A>(gates[i * stride], ups[i * stride]);
}

}  // namespace

void gate(int activation, const float* pairs, int64_t intermediate, int64_t first, int64_t count, float* h) {
  const float* gates = pairs + first;
  switch (activation) {
    case kSilu: return gate_all<kSilu>(gates, gates + intermediate, 1, count, h);
    case kGelu: return gate_all<kGelu>(gates, gates + intermediate, 1, count, h);
    case kGeluTanh: return gate_all<kGeluTanh>(gates, gates + intermediate, 1, count, h);
    default: return gate_all<kSwigluOai>(pairs + 2 * first, pairs + 2 * first + 1, 2, count, h);
  }
}

void weighted_sum(const float* const* rows, const float* weights, int64_t routes, int64_t count, float* y) {
  std::fill_n(y, count, 0.0f);
  for (int64_t route = 0; route < routes; ++route) {
    const float *row = rows[route], weight = weights[route];
    if (!row) continue;
    for (int64_t i = 0; i < count; ++i) y[i] += weight * row[i];
  }
}

}  // namespace neuqi
