// The C interface. The caller checks shapes and dtypes; here every pointer is trusted.
#include <atomic>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "gather.h"
#include "layout.h"
#include "repack.h"
#include "team.h"
#include "variants.h"

#define NEUQI_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Raise with every change of the functions below or of the tile layout.
constexpr int kAbi = 5;

// Instruction sets, weakest first within an architecture; the numbers are part of the interface.
enum Isa { kPortable = 0, kAvx2 = 1, kAvxVnni = 2, kAvx512 = 3, kAvx512Vnni = 4, kNeon = 5, kIsaCount = 6 };

struct Kernels {
  bool (*gemm)(const neuqi::GemmArgs&) = nullptr;
  int (*experts)(const neuqi::ExpertsArgs&) = nullptr;
};

// The functions of an instruction set, null where it is not compiled in.
Kernels kernels_of(int isa) {
  switch (isa) {
    case kPortable: return {neuqi::gemm_portable, neuqi::experts_portable};
#ifdef NEUQI_HAS_AVX2
    case kAvx2: return {neuqi::gemm_avx2, neuqi::experts_avx2};
#endif
#ifdef NEUQI_HAS_AVX_VNNI
    case kAvxVnni: return {neuqi::gemm_avx_vnni, neuqi::experts_avx_vnni};
#endif
#ifdef NEUQI_HAS_AVX512
    case kAvx512: return {neuqi::gemm_avx512, neuqi::experts_avx512};
#endif
#ifdef NEUQI_HAS_AVX512_VNNI
    case kAvx512Vnni: return {neuqi::gemm_avx512_vnni, neuqi::experts_avx512_vnni};
#endif
#ifdef NEUQI_HAS_NEON
    case kNeon: return {neuqi::gemm_neon, neuqi::experts_neon};
#endif
    default: return {};
  }
}

#if defined(__x86_64__)
// Leaf 7, subleaf 1, EAX: compilers learn to ask for this feature by name later than they can compile for it.
bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}
#endif

bool cpu_has(int isa) {
  if (isa == kPortable) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == kAvx2) return avx2;
  if (isa == kAvxVnni) return avx2 && has_avx_vnni();
  if (isa == kAvx512) return avx512;
  if (isa == kAvx512Vnni) return avx512 && __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__) && defined(__linux__)
  // HWCAP_ASIMDDP: the byte dot product.
  if (isa == kNeon) return getauxval(AT_HWCAP) >> 20 & 1;
#elif defined(__aarch64__) && defined(__APPLE__)
  if (isa == kNeon) return true;
#endif
  return false;
}

struct Read {
  const uint64_t* words;
  int64_t chunks;
  std::atomic<int64_t> next{0};
  std::atomic<uint64_t> sum{0};
};

constexpr int64_t kReadWords = 1 << 17;

void read_chunks(void* data) {
  auto& job = *static_cast<Read*>(data);
  uint64_t sums[8] = {};
  for (int64_t chunk; (chunk = job.next.fetch_add(1, std::memory_order_relaxed)) < job.chunks;) {
    const uint64_t* words = job.words + chunk * kReadWords;
    for (int64_t i = 0; i < kReadWords; i += 8)
      for (int j = 0; j < 8; ++j) sums[j] += words[i + j];
  }
  uint64_t sum = 0;
  for (uint64_t one : sums) sum += one;
  job.sum += sum;
}

}  // namespace

NEUQI_EXPORT int neuqi_cpu_abi() { return kAbi; }

// Bit i: instruction set i is compiled in / is offered by this CPU.
NEUQI_EXPORT int neuqi_cpu_built() {
  int mask = 0;
  for (int isa = kPortable; isa < kIsaCount; ++isa) mask |= int(kernels_of(isa).gemm != nullptr) << isa;
  return mask;
}

NEUQI_EXPORT int neuqi_cpu_supported() {
  int mask = 0;
  for (int isa = kPortable; isa < kIsaCount; ++isa) mask |= int(cpu_has(isa)) << isa;
  return mask;
}

NEUQI_EXPORT int neuqi_cpu_team_is_shared() { return neuqi::team_is_shared(); }

NEUQI_EXPORT int64_t neuqi_cpu_tile_bytes(int64_t k, int bits, int64_t group, int scale_kind) {
  return neuqi::Geometry{neuqi::kTile, k, group, bits, scale_kind}.tile_bytes();
}

NEUQI_EXPORT void neuqi_cpu_repack(const void* qweight, const void* scale, const void* zero, void* tiles, int64_t n,
                                   int64_t k, int bits, int64_t group, int scale_kind, int threads) {
  neuqi::repack({n, k, group, bits, scale_kind}, static_cast<const uint32_t*>(qweight), scale, zero,
                static_cast<uint8_t*>(tiles), threads);
}

NEUQI_EXPORT void neuqi_cpu_dequantize(const void* tiles, float* weight, int64_t n, int64_t k, int bits, int64_t group,
                                       int scale_kind, int threads) {
  neuqi::dequantize({n, k, group, bits, scale_kind}, static_cast<const uint8_t*>(tiles), weight, threads);
}

// y [m, n] = x [m, k] · Ŵᵀ + bias, in the dtype of x. Returns 0, or 1 when memory is short.
NEUQI_EXPORT int neuqi_cpu_gemm(int isa, const void* x, const void* tiles, const void* bias, void* y, int64_t m,
                                int64_t n, int64_t k, int bits, int64_t group, int x_kind, int scale_kind,
                                int bias_kind, int threads) {
  neuqi::GemmArgs args{{n, k, group, bits, scale_kind}, static_cast<const uint8_t*>(tiles), x, bias, y, m, x_kind,
                       bias_kind, threads, x_kind, nullptr};
  return !kernels_of(isa).gemm(args);
}

// y [tokens, hidden] = Σ over the top_k experts of a token of weight · (activation(x · Ŵ₁ᵀ + b₁) · Ŵ₂ᵀ + b₂), in the type
// of x. ids int32, weights float32 [tokens, top_k], top_k at most 64; negative ids count nothing. The tiles and biases of
// the experts lie one after the other. Returns 0, 1 when memory is short, 2 when an id is not below `experts`.
NEUQI_EXPORT int neuqi_cpu_experts(int isa, const void* x, const void* first_tiles, const void* first_bias,
                                   const void* second_tiles, const void* second_bias, const void* ids,
                                   const void* weights, void* y, int64_t tokens, int64_t top_k, int64_t experts,
                                   int64_t hidden, int64_t intermediate, int first_bits, int64_t first_group,
                                   int second_bits, int64_t second_group, int kind, int scale_kind, int bias_kind,
                                   int activation, int threads) {
  neuqi::ExpertsArgs args{{2 * intermediate, hidden, first_group, first_bits, scale_kind},
                          {hidden, intermediate, second_group, second_bits, scale_kind},
                          static_cast<const uint8_t*>(first_tiles),
                          static_cast<const uint8_t*>(second_tiles),
                          first_bias,
                          second_bias,
                          x,
                          static_cast<const int32_t*>(ids),
                          static_cast<const float*>(weights),
                          y,
                          tokens,
                          top_k,
                          experts,
                          kind,
                          bias_kind,
                          activation,
                          threads};
  return kernels_of(isa).experts(args);
}

// Reads `bytes` (whole chunks of 1 MiB) once and returns a sum of them: the yardstick of the benchmarks.
NEUQI_EXPORT uint64_t neuqi_cpu_read(const void* data, int64_t bytes, int threads) {
  Read job{static_cast<const uint64_t*>(data), bytes / 8 / kReadWords};
  neuqi::team_run(read_chunks, &job, threads);
  return job.sum;
}

// y [count, k] = rows `ids` (int64) of Ŵ [n, k], in the type of `y_kind`. Returns 0, or 1 when an id is out of range.
NEUQI_EXPORT int neuqi_cpu_gather(const void* tiles, const void* ids, void* y, int64_t count, int64_t n, int64_t k,
                                  int bits, int64_t group, int scale_kind, int y_kind, int threads) {
  return !neuqi::gather({n, k, group, bits, scale_kind}, static_cast<const uint8_t*>(tiles),
                        static_cast<const int64_t*>(ids), count, y, y_kind, threads);
}
