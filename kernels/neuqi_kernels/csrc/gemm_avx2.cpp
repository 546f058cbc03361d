#include "variants.h"

#ifdef __AVX2__

#include "simd_avx2.h"

namespace neuqi {

bool gemm_avx2(const GemmArgs& args) { return gemm<Avx2>(args); }
int experts_avx2(const ExpertsArgs& args) { return experts<Avx2>(args); }

}  // namespace neuqi

#endif
