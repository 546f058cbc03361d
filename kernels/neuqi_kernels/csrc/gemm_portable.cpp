#include "variants.h"

#include "simd_portable.h"

namespace neuqi {

bool gemm_portable(const GemmArgs& args) { return gemm<Portable>(args); }

}  // namespace neuqi
