// AVX-512 with BF16: pairs of codes against pairs of activations, `vdpbf16ps`, float32 accumulators.
//
// A code becomes a bf16 number by a table look-up, `vpermw`, which uses five bits of an index and ignores the others:
// no mask is needed, and with 2 bits one shift serves two codes. Codes are exact in bf16, and so are bf16 activations.
// float16 activations are split into two bf16 parts and float32 into three, which together are exact; each part is
// multiplied like a token of its own.
#include "variants.h"

#ifdef __AVX512BF16__

#include <immintrin.h>

#include "driver.h"

namespace neuqi {
namespace {

#define NEUQI_INLINE inline __attribute__((always_inline))
#define NEUQI_UNROLL _Pragma("GCC unroll 32")

NEUQI_INLINE __m512 load16(const void* data, int64_t index, int kind) {
  if (kind == kFloat32) return _mm512_loadu_ps(static_cast<const float*>(data) + index);
  __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(data) + index));
  if (kind == kFloat16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

NEUQI_INLINE __m512 round_to_bfloat(__m512 value) {
  __m256i half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// bf16 numbers by five-bit index: the code is `width` bits of the index from bit `from`, times `factor`.
struct Table {
  alignas(64) uint16_t of[32];
  constexpr Table(int from, int width, int factor) : of() {
    for (int i = 0; i < 32; ++i) of[i] = bfloat((i >> from & ((1 << width) - 1)) * factor);
  }
  // The code whose bits are bits 3, 4 and 0 of the index.
  constexpr Table() : of() {
    for (int i = 0; i < 32; ++i) of[i] = bfloat((i >> 3 & 3) | (i & 1) << 2);
  }
  static constexpr uint16_t bfloat(int value) {
    int exponent = 0;
    while (value >> exponent > 1) ++exponent;
    return value ? uint16_t((127 + exponent) << 7 | ((value << 7 >> exponent) & 0x7F)) : uint16_t(0);
  }
  NEUQI_INLINE __m512i load() const { return _mm512_load_si512(of); }
};

template <int T>
struct Registers {
  __m512i of[T];
};

template <int T>
NEUQI_INLINE Registers<T> load_registers(const uint8_t* codes, int64_t stride, int index) {
  Registers<T> raw;
  // Four tiles are a whole strip, whose distance is known here.
  const uint8_t* from = codes + index * (T == kStrip ? T * kRegisterBytes : stride);
  NEUQI_UNROLL for (int t = 0; t < T; ++t) raw.of[t] = _mm512_loadu_si512(from + t * kRegisterBytes);
  return raw;
}

template <int S, int T>
NEUQI_INLINE Registers<T> shifted(const Registers<T>& raw) {
  Registers<T> view;
  NEUQI_UNROLL for (int t = 0; t < T; ++t) view.of[t] = _mm512_srli_epi16(raw.of[t], S);
  return view;
}

template <int T>
NEUQI_INLINE Registers<T> look_up(__m512i table, const Registers<T>& index) {
  Registers<T> values;
  NEUQI_UNROLL for (int t = 0; t < T; ++t) values.of[t] = _mm512_permutexvar_epi16(index.of[t], table);
  return values;
}

// Bits of `set` where `mask` is set, bits of `clear` elsewhere.
template <int T>
NEUQI_INLINE Registers<T> pick(int mask, const Registers<T>& set, const Registers<T>& clear) {
  Registers<T> result;
  NEUQI_UNROLL for (int t = 0; t < T; ++t)
    result.of[t] = _mm512_ternarylogic_epi32(_mm512_set1_epi16(short(mask)), set.of[t], clear.of[t], 0xCA);
  return result;
}

// `block(codes, take)` unpacks a block of 32 input features and hands them to `take(field, pair, values)`, a pair of
// codes or of halves of codes at a time.
template <int B, int T>
struct Unpacker;

template <int T>
struct Unpacker<2, T> {
  static constexpr Table kLow{0, 2, 1}, kHigh{2, 2, 1};
  __m512i low = kLow.load(), high = kHigh.load();

  template <class Take>
  NEUQI_INLINE void two(int pair, const Registers<T>& view, Take& take) const {
    take(pair, pair, look_up(low, view));
    take(pair + 1, pair + 1, look_up(high, view));
  }
  template <class Take>
  NEUQI_INLINE void block(const uint8_t* codes, int64_t stride, Take& take) const {
    NEUQI_UNROLL for (int r = 0; r < 2; ++r) {
      Registers<T> raw = load_registers<T>(codes, stride, r);
      two(8 * r, raw, take);
      two(8 * r + 2, shifted<4>(raw), take);
      two(8 * r + 4, shifted<8>(raw), take);
      two(8 * r + 6, shifted<12>(raw), take);
    }
  }
};

template <int T>
struct Unpacker<3, T> {
  static constexpr Table kPlain{0, 3, 1}, kShifted{1, 3, 1}, kSpare{};
  __m512i plain = kPlain.load(), one_up = kShifted.load(), spare = kSpare.load();

  template <class Take>
  NEUQI_INLINE void block(const uint8_t* codes, int64_t stride, Take& take) const {
    Registers<T> raw = load_registers<T>(codes, stride, 0);
    take(0, 0, look_up(plain, raw));
    take(1, 1, look_up(plain, shifted<3>(raw)));
    take(2, 2, look_up(plain, shifted<6>(raw)));
    take(3, 3, look_up(plain, shifted<9>(raw)));
    Registers<T> last = shifted<12>(raw);
    take(4, 4, look_up(plain, last));
    raw = load_registers<T>(codes, stride, 1);
    take(5, 5, look_up(plain, raw));
    take(6, 6, look_up(plain, shifted<3>(raw)));
    take(7, 7, look_up(plain, shifted<6>(raw)));
    take(8, 8, look_up(plain, shifted<9>(raw)));
    Registers<T> top = shifted<11>(raw);
    take(9, 9, look_up(one_up, top));
    // Bit 3 is the spare bit of the first register, bit 4 of the second, bit 0 of the third.
    last = pick(0x08, last, top);
    raw = load_registers<T>(codes, stride, 2);
    take(10, 10, look_up(one_up, raw));
    last = pick(0x18, last, raw);
    take(11, 11, look_up(plain, shifted<4>(raw)));
    take(12, 12, look_up(plain, shifted<7>(raw)));
    take(13, 13, look_up(plain, shifted<10>(raw)));
    take(14, 14, look_up(plain, shifted<13>(raw)));
    take(15, 15, look_up(spare, last));
  }
};

template <int T>
struct Unpacker<4, T> {
  static constexpr Table kTable{0, 4, 1};
  __m512i table = kTable.load();

  template <class Take>
  NEUQI_INLINE void block(const uint8_t* codes, int64_t stride, Take& take) const {
    NEUQI_UNROLL for (int r = 0; r < 4; ++r) {
      Registers<T> raw = load_registers<T>(codes, stride, r);
      take(4 * r, 4 * r, look_up(table, raw));
      take(4 * r + 1, 4 * r + 1, look_up(table, shifted<4>(raw)));
      take(4 * r + 2, 4 * r + 2, look_up(table, shifted<8>(raw)));
      take(4 * r + 3, 4 * r + 3, look_up(table, shifted<12>(raw)));
    }
  }
};

// An 8-bit code goes in two halves, which meet the same activations.
template <int T>
struct Unpacker<8, T> {
  static constexpr Table kLow{0, 4, 1}, kHigh{0, 4, 16};
  __m512i low = kLow.load(), high = kHigh.load();

  template <class Take>
  NEUQI_INLINE void block(const uint8_t* codes, int64_t stride, Take& take) const {
    NEUQI_UNROLL for (int r = 0; r < 8; ++r) {
      Registers<T> raw = load_registers<T>(codes, stride, r);
      take(4 * r, 2 * r, look_up(low, raw));
      take(4 * r + 1, 2 * r, look_up(high, shifted<4>(raw)));
      take(4 * r + 2, 2 * r + 1, look_up(low, shifted<8>(raw)));
      take(4 * r + 3, 2 * r + 1, look_up(high, shifted<12>(raw)));
    }
  }
};

template <int R, int T>
struct Accumulator {
  // Enough independent sums to hide the latency of the dot product.
  static constexpr int kChains = R * T >= 8 ? 1 : R * T >= 4 ? 2 : R * T >= 2 ? 4 : 8;
  // With one row, look-ups compete with products for a port; a few look-ups at once, then their products, is faster
  // than turn by turn.
  static constexpr int kBatch = R == 1 ? 4 : 1;
  __m512 sums[T][R][kChains];
  Registers<T> pending[kBatch];
  int pending_pair[kBatch];
  const uint32_t* xs;

  NEUQI_INLINE void start() {
    NEUQI_UNROLL for (int t = 0; t < T; ++t)
      NEUQI_UNROLL for (int r = 0; r < R; ++r)
        NEUQI_UNROLL for (int c = 0; c < kChains; ++c) sums[t][r][c] = _mm512_setzero_ps();
  }

  NEUQI_INLINE void operator()(int field, int pair, const Registers<T>& values) {
    if constexpr (kBatch == 1) return add(field, pair, values);
    pending[field % kBatch] = values;
    pending_pair[field % kBatch] = pair;
    if (field % kBatch != kBatch - 1) return;
    // Keeps the compiler from moving products up among the look-ups.
    NEUQI_UNROLL for (int i = 0; i < kBatch; ++i)
      NEUQI_UNROLL for (int t = 0; t < T; ++t) asm volatile("" : "+v"(pending[i].of[t]));
    NEUQI_UNROLL for (int i = 0; i < kBatch; ++i) add(i, pending_pair[i], pending[i]);
  }

  NEUQI_INLINE void add(int field, int pair, const Registers<T>& values) {
    NEUQI_UNROLL for (int r = 0; r < R; ++r) {
      __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(int(xs[pair * R + r])));
      NEUQI_UNROLL for (int t = 0; t < T; ++t) {
        __m512& sum = sums[t][r][field % kChains];
        sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(values.of[t]), x);
      }
    }
  }

  NEUQI_INLINE __m512 total(int t, int r) const {
    __m512 chains[kChains];
    NEUQI_UNROLL for (int c = 0; c < kChains; ++c) chains[c] = sums[t][r][c];
    NEUQI_UNROLL for (int width = kChains / 2; width; width /= 2)
      NEUQI_UNROLL for (int c = 0; c < width; ++c) chains[c] = _mm512_add_ps(chains[c], chains[c + width]);
    return chains[0];
  }
};

// Adds the product of R rows and T tiles over some groups to `y [tile][row][16]`. `stride`: rows of all panels, the
// distance between the activations of one group and the next.
template <int B, int R, int T>
void multiply_tiles(const Geometry& geometry, const uint8_t* weights, const Position& position, const uint32_t* xs,
                    const float* sums, int64_t stride, int64_t first, int64_t last, float* y) {
  const int64_t blocks = geometry.blocks(), header_bytes = geometry.header_bytes();
  const int kind = geometry.scale_kind;
  const Unpacker<B, T> unpacker;
  Accumulator<R, T> accumulator;
  __m512 results[T][R];
  NEUQI_UNROLL for (int t = 0; t < T; ++t)
    NEUQI_UNROLL for (int r = 0; r < R; ++r) results[t][r] = _mm512_load_ps(y + (t * R + r) * kTile);
  for (int64_t g = first; g < last; ++g) {
    const uint8_t* codes = weights + position.codes + g * position.group_stride;
    accumulator.xs = xs + g * blocks * kPairs * stride;
    accumulator.start();
    for (int64_t block = 0; block < blocks; ++block, codes += position.block_stride) {
      unpacker.block(codes, position.register_stride, accumulator);
      accumulator.xs += kPairs * R;
    }
    const uint8_t* header = weights + position.header + g * position.group_stride;
    NEUQI_UNROLL for (int t = 0; t < T; ++t, header += header_bytes) {
      __m512 scale = load16(header, 0, kind), zero = load16(header + header_bytes / 2, 0, kind);
      NEUQI_UNROLL for (int r = 0; r < R; ++r) {
        __m512 sum = _mm512_fnmadd_ps(zero, _mm512_set1_ps(sums[g * stride + r]), accumulator.total(t, r));
        results[t][r] = _mm512_fmadd_ps(scale, sum, results[t][r]);
      }
    }
  }
  NEUQI_UNROLL for (int t = 0; t < T; ++t)
    NEUQI_UNROLL for (int r = 0; r < R; ++r) _mm512_store_ps(y + (t * R + r) * kTile, results[t][r]);
}

using Multiply = void (*)(const Geometry&, const uint8_t*, const Position&, const uint32_t*, const float*, int64_t,
                          int64_t, int64_t, float*);

template <int B, int R>
Multiply by_tiles(int tiles) {
  return tiles == 4 ? multiply_tiles<B, R, 4> : tiles == 2 ? multiply_tiles<B, R, 2> : multiply_tiles<B, R, 1>;
}

template <int B>
Multiply by_rows(int rows, int tiles) {
  switch (rows) {
    case 1: return by_tiles<B, 1>(tiles);
    case 2: return by_tiles<B, 2>(tiles);
    case 3: return by_tiles<B, 3>(tiles);
    default: return by_tiles<B, 4>(tiles);
  }
}

struct Variant {
  // A pair of bf16 activations.
  using X = uint32_t;
  static constexpr int kXPerBlock = kPairs;
  // Four tiles times four rows of sums fit the registers with everything else.
  static constexpr int kMostRows = 4;
  static constexpr int kMostTiles = kStrip;

  static int parts(int kind) { return kind == kFloat32 ? 3 : kind == kFloat16 ? 2 : 1; }
  static void pause() { _mm_pause(); }

  // Writes the bf16 parts of one group of one token to `xs[pair·rows + part]` and their sums to `sums[part]`.
  static void prepare_group(const void* x, int64_t index, int kind, int64_t blocks, int parts, int rows, uint32_t* xs,
                            float* sums) {
    __m512 totals[3] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t block = 0; block < blocks; ++block, index += kBlock, xs += kPairs * rows) {
      __m512 low = load16(x, index, kind), high = load16(x, index + kTile, kind);
      for (int part = 0; part < parts; ++part) {
        __m512 low_part = round_to_bfloat(low), high_part = round_to_bfloat(high);
        low = _mm512_sub_ps(low, low_part), high = _mm512_sub_ps(high, high_part);
        totals[part] = _mm512_add_ps(totals[part], _mm512_add_ps(low_part, high_part));
        alignas(64) uint32_t pairs[kPairs];
        _mm512_store_si512(pairs, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high_part, low_part)));
        for (int pair = 0; pair < kPairs; ++pair) xs[pair * rows + part] = pairs[pair];
      }
    }
    for (int part = 0; part < parts; ++part) sums[part] = _mm512_reduce_add_ps(totals[part]);
  }

  static void multiply(const Job<Variant>& job, const Panel& panel, const Position& position, int tiles, int64_t first,
                       int64_t last, float* y) {
    const Geometry& geometry = job.args.geometry;
    Multiply function = geometry.bits == 2   ? by_rows<2>(panel.rows, tiles)
                        : geometry.bits == 3 ? by_rows<3>(panel.rows, tiles)
                        : geometry.bits == 4 ? by_rows<4>(panel.rows, tiles)
                                             : by_rows<8>(panel.rows, tiles);
    function(geometry, job.args.weights, position, job.group_xs(0, panel), job.group_sums(0, panel), job.rows(), first,
             last, y);
  }

  static void store(void* y, int64_t index, int kind, const float* values, int parts, const float* bias, int count) {
    __mmask16 mask = __mmask16((1u << count) - 1);
    __m512 value = _mm512_load_ps(values);
    for (int part = 1; part < parts; ++part) value = _mm512_add_ps(value, _mm512_load_ps(values + part * kTile));
    value = _mm512_add_ps(value, _mm512_load_ps(bias));
    if (kind == kFloat32) return _mm512_mask_storeu_ps(static_cast<float*>(y) + index, mask, value);
    __m256i half = kind == kFloat16 ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                                    : reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + index, mask, half);
  }
};

}  // namespace

bool gemm_avx512_bf16(const GemmArgs& args) { return gemm<Variant>(args); }

}  // namespace neuqi

#endif
