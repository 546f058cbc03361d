#include "variants.h"

#define NEUQI_LANES 4
#include "gemm_float32.h"

namespace neuqi {

bool gemm_portable(const GemmArgs& args) { return gemm<Variant>(args); }

}  // namespace neuqi
