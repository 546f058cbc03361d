// Any CPU. `fmaf` is one instruction where the CPU has it (every 64-bit ARM), and a slow call elsewhere.
#include <cmath>

namespace neuqi {
namespace {

struct Lanes {
  static constexpr int kCount = 8;
  static constexpr int kStarts = 2;
  struct Floats {
    float v[kCount];
  };
  struct Mask {
    bool v[kCount];
  };

  template <class Function>
  static Floats each(Function function) {
    Floats result;
    for (int i = 0; i < kCount; ++i) result.v[i] = function(i);
    return result;
  }

  static Floats set(float x) {
    return each([=](int) { return x; });
  }
  static Floats load(const float* p) {
    return each([=](int i) { return p[i]; });
  }
  static void store(float* p, const Floats& x) {
    for (int i = 0; i < kCount; ++i) p[i] = x.v[i];
  }
  static Floats add(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static Floats sub(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  static Floats mul(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static Floats div(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
  static Floats sqrt(const Floats& a) {
    return each([&](int i) { return std::sqrt(a.v[i]); });
  }
  static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
  }
  static Floats fnma(const Floats& a, const Floats& b, const Floats& c) {
    return each([&](int i) { return std::fma(-a.v[i], b.v[i], c.v[i]); });
  }
  // The second operand where one is not a number, as on x86.
  static Floats min(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static Floats max(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  // To nearest even, for 0 ≤ a < 2^22.
  static Floats round(const Floats& a) {
    return each([&](int i) { return (a.v[i] + 0x1.8p23f) - 0x1.8p23f; });
  }
  static Mask less(const Floats& a, const Floats& b) {
    Mask mask;
    for (int i = 0; i < kCount; ++i) mask.v[i] = a.v[i] < b.v[i];
    return mask;
  }
  static Mask both(const Mask& a, const Mask& b) {
    Mask mask;
    for (int i = 0; i < kCount; ++i) mask.v[i] = a.v[i] && b.v[i];
    return mask;
  }
  static bool any(const Mask& a) {
    bool result = false;
    for (int i = 0; i < kCount; ++i) result |= a.v[i];
    return result;
  }
  static Floats choose(const Mask& m, const Floats& a, const Floats& b) {
    return each([&](int i) { return m.v[i] ? a.v[i] : b.v[i]; });
  }
};

}  // namespace
}  // namespace neuqi

#include "quantize_driver.h"

namespace neuqi {

QuantizeResult quantize_portable(const QuantizeArgs& args) { return quantize(args); }

}  // namespace neuqi
