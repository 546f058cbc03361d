#include "variants.h"

#ifdef __AVX512BW__

#include "simd_avx512.h"

namespace neuqi {

bool gemm_avx512(const GemmArgs& args) { return gemm<Avx512>(args); }
int experts_avx512(const ExpertsArgs& args) { return experts<Avx512>(args); }

}  // namespace neuqi

#endif
