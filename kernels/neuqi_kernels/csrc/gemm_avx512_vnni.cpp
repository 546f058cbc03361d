#include "variants.h"

#ifdef __AVX512VNNI__

#define NEUQI_DOT(sums, codes, digits) _mm512_dpbusd_epi32(sums, codes, digits)
#include "simd_avx512.h"

namespace neuqi {

bool gemm_avx512_vnni(const GemmArgs& args) { return gemm<Avx512>(args); }
int experts_avx512_vnni(const ExpertsArgs& args) { return experts<Avx512>(args); }

}  // namespace neuqi

#endif
