#include "variants.h"

#include "simd_portable.h"

namespace neuqi {

bool gemm_portable(const GemmArgs& args) { return gemm<Portable>(args); }
int experts_portable(const ExpertsArgs& args) { return experts<Portable>(args); }

}  // namespace neuqi
