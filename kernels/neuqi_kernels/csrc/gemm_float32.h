// Any CPU: float32 multiply-add on vectors of NEUQI_LANES lanes, in the compiler's own vector types. Compiled once per
// instruction set. Activations of every dtype and codes are float32 here, so all of them are exact.
#include "driver.h"

namespace neuqi {
namespace {

#define NEUQI_INLINE inline __attribute__((always_inline))
#define NEUQI_UNROLL _Pragma("GCC unroll 32")

constexpr int kLanes = NEUQI_LANES;
constexpr int kPartsOfTile = kTile / kLanes;
constexpr int kPartsAtOnce = kPartsOfTile > 1 ? 2 : 1;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

NEUQI_INLINE Floats load_floats(const uint8_t* base, int lane, int kind) {
  Floats result;
  if (kind == kFloat32) {
    std::memcpy(&result, base + 4 * lane, sizeof result);
    return result;
  }
  Halves halves;
  std::memcpy(&halves, base + 2 * lane, sizeof halves);
  Words words = __builtin_convertvector(halves, Words);
  if (kind == kBfloat16) return reinterpret_cast<Floats>(words << 16);
  // As in half_to_float.
  Floats magnitude = reinterpret_cast<Floats>((words & 0x7FFF) << 13) * 0x1p112f;
  Words special = reinterpret_cast<Words>((words & 0x7C00) == 0x7C00) & 0x7F800000;
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(magnitude) | special | (words & 0x8000) << 16);
}

template <int R>
struct Accumulator {
  static constexpr int T = kPartsAtOnce;
  static constexpr int kChains = R * T >= 8 ? 1 : R * T >= 4 ? 2 : 4;
  Floats sums[T][R][kChains];
  const float* xs;

  NEUQI_INLINE void start() {
    NEUQI_UNROLL for (int t = 0; t < T; ++t)
      NEUQI_UNROLL for (int r = 0; r < R; ++r)
        NEUQI_UNROLL for (int c = 0; c < kChains; ++c) sums[t][r][c] = Floats{};
  }

  NEUQI_INLINE void take(int feature, const Words (&codes)[T]) {
    Floats values[T];
    NEUQI_UNROLL for (int t = 0; t < T; ++t)
      values[t] = __builtin_convertvector(reinterpret_cast<Integers>(codes[t]), Floats);
    NEUQI_UNROLL for (int r = 0; r < R; ++r)
      NEUQI_UNROLL for (int t = 0; t < T; ++t) sums[t][r][feature % kChains] += values[t] * xs[feature * R + r];
  }

  NEUQI_INLINE Floats total(int t, int r) const {
    Floats sum = sums[t][r][0];
    NEUQI_UNROLL for (int c = 1; c < kChains; ++c) sum += sums[t][r][c];
    return sum;
  }
};

// Hands the codes of one block of 32 input features to the accumulator, slice by slice of layout.h.
template <int B, int R>
NEUQI_INLINE void multiply_block(const uint8_t* codes, int64_t register_stride, Accumulator<R>& accumulator) {
  constexpr int T = kPartsAtOnce;
  Words joined[2][T] = {};
  NEUQI_UNROLL for (int i = 0; i < Layout<B>::kSlices; ++i) {
    const Slice slice = Layout<B>::slice(i);
    NEUQI_UNROLL for (int odd = 0; odd < 2; ++odd) {
      Words part[T];
      NEUQI_UNROLL for (int t = 0; t < T; ++t) {
        std::memcpy(&part[t], codes + slice.index * register_stride + t * 4 * kLanes, sizeof part[t]);
        part[t] = part[t] >> (slice.position + 16 * odd) & ((1u << slice.width) - 1);
      }
      if (slice.width == B) {
        accumulator.take(2 * slice.pair + odd, part);
        continue;
      }
      NEUQI_UNROLL for (int t = 0; t < T; ++t) joined[odd][t] |= part[t] << slice.source;
      if (i == Layout<B>::kSlices - 1) accumulator.take(2 * slice.pair + odd, joined[odd]);
    }
  }
}

// Adds the product of R rows and a tile over some groups to `y [row][16]`. `stride`: rows of all panels, the distance
// between the activations of one group and the next.
template <int B, int R>
void multiply_tile(const Geometry& geometry, const uint8_t* weights, const Position& position, const float* xs,
                   const float* sums, int64_t stride, int64_t first, int64_t last, float* y) {
  constexpr int T = kPartsAtOnce;
  const int kind = geometry.scale_kind;
  for (int part = 0; part < kPartsOfTile; part += T) {
    Floats results[T][R];
    NEUQI_UNROLL for (int t = 0; t < T; ++t)
      NEUQI_UNROLL for (int r = 0; r < R; ++r)
        std::memcpy(&results[t][r], y + r * kTile + (part + t) * kLanes, sizeof results[t][r]);
    Accumulator<R> accumulator;
    for (int64_t g = first; g < last; ++g) {
      const uint8_t* header = weights + position.header + g * position.group_stride;
      const uint8_t* codes = weights + position.codes + g * position.group_stride + part * 4 * kLanes;
      accumulator.xs = xs + g * geometry.group * stride;
      accumulator.start();
      for (int64_t block = 0; block < geometry.blocks(); ++block) {
        multiply_block<B, R>(codes + block * position.block_stride, position.register_stride, accumulator);
        accumulator.xs += kBlock * R;
      }
      NEUQI_UNROLL for (int t = 0; t < T; ++t) {
        Floats scale = load_floats(header, (part + t) * kLanes, kind);
        Floats zero = load_floats(header + geometry.header_bytes() / 2, (part + t) * kLanes, kind);
        NEUQI_UNROLL for (int r = 0; r < R; ++r)
          results[t][r] += scale * (accumulator.total(t, r) - zero * sums[g * stride + r]);
      }
    }
    NEUQI_UNROLL for (int t = 0; t < T; ++t)
      NEUQI_UNROLL for (int r = 0; r < R; ++r)
        std::memcpy(y + r * kTile + (part + t) * kLanes, &results[t][r], sizeof results[t][r]);
  }
}

using Multiply = void (*)(const Geometry&, const uint8_t*, const Position&, const float*, const float*, int64_t,
                          int64_t, int64_t, float*);

template <int B>
Multiply by_rows(int rows) {
  switch (rows) {
    case 1: return multiply_tile<B, 1>;
    case 2: return multiply_tile<B, 2>;
    case 3: return multiply_tile<B, 3>;
    default: return multiply_tile<B, 4>;
  }
}

struct Variant {
  using X = float;
  static constexpr int kXPerBlock = kBlock;
  static constexpr int kMostRows = 4;
  static constexpr int kMostTiles = 1;

  static int parts(int) { return 1; }
  
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  static void prepare_group(const void* x, int64_t index, int kind, int64_t blocks, int, int rows, float* xs,
                            float* sums) {
    // As many partial sums as a block has features, for accuracy and for vectorization.
    float totals[kBlock] = {};
    for (int64_t block = 0; block < blocks; ++block, index += kBlock, xs += kBlock * rows) {
      for (int i = 0; i < kBlock; ++i) {
        float value = load_scalar(x, index + i, kind);
        totals[i] += value;
        xs[i * rows] = value;
      }
    }
    for (int width = kBlock / 2; width; width /= 2)
      for (int i = 0; i < width; ++i) totals[i] += totals[i + width];
    sums[0] = totals[0];
  }

  static void multiply(const Job<Variant>& job, const Panel& panel, const Position& position, int, int64_t first,
                       int64_t last, float* y) {
    const Geometry& geometry = job.args.geometry;
    Multiply function = geometry.bits == 2   ? by_rows<2>(panel.rows)
                        : geometry.bits == 3 ? by_rows<3>(panel.rows)
                        : geometry.bits == 4 ? by_rows<4>(panel.rows)
                                             : by_rows<8>(panel.rows);
    function(geometry, job.args.weights, position, job.group_xs(0, panel), job.group_sums(0, panel), job.rows(), first,
             last, y);
  }

  static void store(void* y, int64_t index, int kind, const float* values, int, const float* bias, int count) {
    for (int i = 0; i < count; ++i) store_scalar(y, index + i, kind, values[i] + bias[i]);
  }
};

}  // namespace
}  // namespace neuqi
