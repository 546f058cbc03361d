#include "variants.h"

#ifdef __AVX2__

#define NEUQI_LANES 8
#include "gemm_float32.h"

namespace neuqi {

bool gemm_avx2(const GemmArgs& args) { return gemm<Variant>(args); }

}  // namespace neuqi

#endif
