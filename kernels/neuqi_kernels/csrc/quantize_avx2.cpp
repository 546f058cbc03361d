#ifdef __AVX2__
#include <immintrin.h>

namespace neuqi {
namespace {

struct Lanes {
  static constexpr int kCount = 8;
  static constexpr int kStarts = 2;
  using Floats = __m256;
  using Mask = __m256;

  static Floats set(float x) { return _mm256_set1_ps(x); }
  static Floats load(const float* p) { return _mm256_load_ps(p); }
  static void store(float* p, Floats x) { _mm256_store_ps(p, x); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
  static Floats sqrt(Floats a) { return _mm256_sqrt_ps(a); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats fnma(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
  static Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static Floats round(Floats a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Mask less(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
  static bool any(Mask a) { return _mm256_movemask_ps(a) != 0; }
  static Floats choose(Mask m, Floats a, Floats b) { return _mm256_blendv_ps(b, a, m); }
};

}  // namespace
}  // namespace neuqi

#include "quantize_driver.h"

namespace neuqi {

QuantizeResult quantize_avx2(const QuantizeArgs& args) { return quantize(args); }

}  // namespace neuqi

#endif
