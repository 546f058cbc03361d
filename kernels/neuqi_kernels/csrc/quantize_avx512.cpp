#ifdef __AVX512F__
#include <immintrin.h>

namespace neuqi {
namespace {

struct Lanes {
  static constexpr int kCount = 16;
  static constexpr int kStarts = 4;
  using Floats = __m512;
  using Mask = __mmask16;

  static Floats set(float x) { return _mm512_set1_ps(x); }
  static Floats load(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, Floats x) { _mm512_store_ps(p, x); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats sqrt(Floats a) { return _mm512_sqrt_ps(a); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
  static Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static Floats round(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
  static Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Mask both(Mask a, Mask b) { return a & b; }
  static bool any(Mask a) { return a != 0; }
  static Floats choose(Mask m, Floats a, Floats b) { return _mm512_mask_blend_ps(m, b, a); }
};

}  // namespace
}  // namespace neuqi

#include "quantize_driver.h"

namespace neuqi {

QuantizeResult quantize_avx512(const QuantizeArgs& args) { return quantize(args); }

}  // namespace neuqi

#endif
