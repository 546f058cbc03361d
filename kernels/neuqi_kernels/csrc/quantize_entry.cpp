// The C interface of the quantizer. The caller checks shapes and dtypes; here every pointer is trusted.
#include "quantize.h"

// Returns 0, 1 when a weight is not finite or too large, 2 when memory is short. `isa` is a number of entry.cpp.
extern "C" __attribute__((visibility("default"))) int neuqi_cpu_quantize(
    int isa, const void* weight, const float* importance, void* qweight, void* scale, void* zero, int64_t rows,
    int64_t columns, int64_t stride, int64_t group, int bits, int kind, int storage, const neuqi::QuantizePlan* plan,
    int threads) {
  neuqi::QuantizeArgs args{weight, importance, static_cast<uint32_t*>(qweight), scale, zero, rows, columns, stride,
                           group,  bits,       kind,                            storage, threads, plan};
#ifdef NEUQI_HAS_AVX512
  if (isa >= 2) return neuqi::quantize_avx512(args);
#endif
#ifdef NEUQI_HAS_AVX2
  if (isa >= 1) return neuqi::quantize_avx2(args);
#endif
  return neuqi::quantize_portable(args);
}

// For a check that both sides mean the same structure.
extern "C" __attribute__((visibility("default"))) int neuqi_cpu_quantize_plan_bytes() {
  return int(sizeof(neuqi::QuantizePlan));
}
