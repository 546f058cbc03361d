#include "variants.h"

#ifdef __AVXVNNI__

#define NEUQI_DOT(sums, codes, digits) _mm256_dpbusd_avx_epi32(sums, codes, digits)
#include "simd_avx2.h"

namespace neuqi {

bool gemm_avx_vnni(const GemmArgs& args) { return gemm<Avx2>(args); }
int experts_avx_vnni(const ExpertsArgs& args) { return experts<Avx2>(args); }

}  // namespace neuqi

#endif
