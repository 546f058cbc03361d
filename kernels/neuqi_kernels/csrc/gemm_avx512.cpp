#include "variants.h"

#ifdef __AVX512F__

#define NEUQI_LANES 16
#include "gemm_float32.h"

namespace neuqi {

bool gemm_avx512(const GemmArgs& args) { return gemm<Variant>(args); }

}  // namespace neuqi

#endif
