// Any CPU: 32-bit lanes in the compiler's own vector types, which it turns into whatever vectors there are.
#pragma once

#include <cmath>

#include "experts.h"

namespace neuqi {
namespace {

struct Portable {
  static constexpr int kLanes = 4;
  typedef uint32_t Codes __attribute__((vector_size(4 * kLanes)));
  typedef int32_t Sums __attribute__((vector_size(4 * kLanes)));
  typedef float Floats __attribute__((vector_size(4 * kLanes)));
  struct Digits {
    int32_t of[4];
  };

  static constexpr int vectors(int, int) { return 1; }
  static constexpr int most_rows(int) { return 2; }

  static void pause() {}

  static NEUQI_INLINE Codes load(const uint8_t* from) {
    Codes codes;
    std::memcpy(&codes, from, sizeof codes);
    return codes;
  }
  // Bits of the neighbour byte come along; a mask removes them.
  template <int S>
  static NEUQI_INLINE Codes shift_right(Codes codes) {
    return codes >> S;
  }
  static NEUQI_INLINE Codes mask(Codes codes, int byte) { return codes & in_every_byte(uint32_t(byte)); }
  static NEUQI_INLINE Codes either(Codes a, Codes b) { return a | b; }

  static NEUQI_INLINE Digits broadcast(const int32_t* x) {
    int8_t bytes[4];
    std::memcpy(bytes, x, sizeof bytes);
    return {{bytes[0], bytes[1], bytes[2], bytes[3]}};
  }
  static NEUQI_INLINE Sums no_sums() { return Sums{}; }
  template <bool W>
  static NEUQI_INLINE Sums dot(Sums sums, Codes codes, Digits digits) {
    sums += reinterpret_cast<Sums>(codes & 0xFF) * digits.of[0];
    sums += reinterpret_cast<Sums>(codes >> 8 & 0xFF) * digits.of[1];
    sums += reinterpret_cast<Sums>(codes >> 16 & 0xFF) * digits.of[2];
    return sums + reinterpret_cast<Sums>(codes >> 24) * digits.of[3];
  }
  static NEUQI_INLINE void keep_in_register(Sums&) {}
  static NEUQI_INLINE Sums shift_left_8(Sums sums) { return sums * 256; }
  static NEUQI_INLINE Sums add(Sums a, Sums b) { return a + b; }

  static NEUQI_INLINE Floats to_floats(Sums sums) { return __builtin_convertvector(sums, Floats); }
  static NEUQI_INLINE Floats all(float value) { return value - Floats{}; }
  static NEUQI_INLINE Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
  }
  static NEUQI_INLINE void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }
  static NEUQI_INLINE Floats multiply(Floats a, Floats b) { return a * b; }
  static NEUQI_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
    for (int lane = 0; lane < kLanes; ++lane) a[lane] = std::fma(a[lane], b[lane], c[lane]);
    return a;
  }
  // a − b·c.
  static NEUQI_INLINE Floats subtract_product(Floats a, Floats b, Floats c) { return multiply_add(-b, c, a); }

  static NEUQI_INLINE Floats load_floats(const void* data, int64_t index, int kind) {
    Floats values;
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = load_scalar(data, index + lane, kind);
    return values;
  }
};

}  // namespace
}  // namespace neuqi
