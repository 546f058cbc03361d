// Two functions per instruction set. Each is compiled with that set's flags and called only where the CPU has it.
#pragma once

#include "layout.h"

namespace neuqi {

bool gemm_avx512_vnni(const GemmArgs& args);
bool gemm_avx512(const GemmArgs& args);
bool gemm_avx_vnni(const GemmArgs& args);
bool gemm_avx2(const GemmArgs& args);
bool gemm_neon(const GemmArgs& args);
bool gemm_portable(const GemmArgs& args);

int experts_avx512_vnni(const ExpertsArgs& args);
int experts_avx512(const ExpertsArgs& args);
int experts_avx_vnni(const ExpertsArgs& args);
int experts_avx2(const ExpertsArgs& args);
int experts_neon(const ExpertsArgs& args);
int experts_portable(const ExpertsArgs& args);

}  // namespace neuqi
