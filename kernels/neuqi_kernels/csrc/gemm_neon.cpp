#include "variants.h"

#ifdef __ARM_FEATURE_DOTPROD

#include "simd_neon.h"

namespace neuqi {

bool gemm_neon(const GemmArgs& args) { return gemm<Neon>(args); }
int experts_neon(const ExpertsArgs& args) { return experts<Neon>(args); }

}  // namespace neuqi

#endif
