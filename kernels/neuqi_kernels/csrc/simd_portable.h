// Any CPU: plain loops that the compiler turns into whatever vectors it has.
#pragma once

#include <cmath>

#include "driver.h"

namespace neuqi {
namespace {

struct Portable {
  static constexpr int kLanes = 4;
  struct Codes {
    uint8_t of[4 * kLanes];
  };
  struct Digits {
    int8_t of[4];
  };
  struct Sums {
    int32_t of[kLanes];
  };
  struct Floats {
    float of[kLanes];
  };

  static constexpr int vectors(int, int) { return 1; }
  static constexpr int most_rows(int) { return 4; }

  static void pause() {}

  static NEUQI_INLINE Codes load(const uint8_t* from) {
    Codes codes;
    std::memcpy(&codes, from, sizeof codes);
    return codes;
  }
  template <int S>
  static NEUQI_INLINE Codes shift_right(Codes codes) {
    for (uint8_t& code : codes.of) code = uint8_t(code >> S);
    return codes;
  }
  static NEUQI_INLINE Codes mask(Codes codes, int byte) {
    for (uint8_t& code : codes.of) code = uint8_t(code & byte);
    return codes;
  }
  static NEUQI_INLINE Codes either(Codes a, const Codes& b) {
    for (int i = 0; i < 4 * kLanes; ++i) a.of[i] = uint8_t(a.of[i] | b.of[i]);
    return a;
  }

  static NEUQI_INLINE Digits broadcast(const int32_t* x) {
    Digits digits;
    std::memcpy(&digits, x, sizeof digits);
    return digits;
  }
  static NEUQI_INLINE Sums no_sums() { return {}; }
  template <bool W>
  static NEUQI_INLINE Sums dot(Sums sums, const Codes& codes, const Digits& digits) {
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < 4; ++i) sums.of[lane] += codes.of[4 * lane + i] * digits.of[i];
    return sums;
  }
  static NEUQI_INLINE void keep_in_register(Sums&) {}
  static NEUQI_INLINE Sums shift_left_8(Sums sums) {
    for (int32_t& sum : sums.of) sum *= 256;
    return sums;
  }
  static NEUQI_INLINE Sums add(Sums a, const Sums& b) {
    for (int lane = 0; lane < kLanes; ++lane) a.of[lane] += b.of[lane];
    return a;
  }

  static NEUQI_INLINE Floats to_floats(const Sums& sums) {
    Floats values;
    for (int lane = 0; lane < kLanes; ++lane) values.of[lane] = float(sums.of[lane]);
    return values;
  }
  static NEUQI_INLINE Floats all(float value) {
    Floats values;
    for (float& one : values.of) one = value;
    return values;
  }
  static NEUQI_INLINE Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
  }
  static NEUQI_INLINE void store(float* to, const Floats& values) { std::memcpy(to, &values, sizeof values); }
  static NEUQI_INLINE Floats multiply(Floats a, const Floats& b) {
    for (int lane = 0; lane < kLanes; ++lane) a.of[lane] *= b.of[lane];
    return a;
  }
  static NEUQI_INLINE Floats multiply_add(Floats a, const Floats& b, const Floats& c) {
    for (int lane = 0; lane < kLanes; ++lane) a.of[lane] = std::fma(a.of[lane], b.of[lane], c.of[lane]);
    return a;
  }
  // a − b·c.
  static NEUQI_INLINE Floats subtract_product(Floats a, const Floats& b, const Floats& c) {
    for (int lane = 0; lane < kLanes; ++lane) a.of[lane] = std::fma(-b.of[lane], c.of[lane], a.of[lane]);
    return a;
  }

  static NEUQI_INLINE Floats load_floats(const void* data, int64_t index, int kind) {
    Floats values;
    for (int lane = 0; lane < kLanes; ++lane) values.of[lane] = load_scalar(data, index + lane, kind);
    return values;
  }
};

}  // namespace
}  // namespace neuqi
