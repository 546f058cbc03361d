// The tile layout: how the kernels see a packed matrix.
//
// Sixteen output rows form a tile, one row per 32-bit lane. Each (tile, group) is one contiguous chunk:
//
//     [scale of 16 rows][zero-point of 16 rows][blocks of 32 input features, `bits` 64-byte registers each]
//
// so that a tile is a single sequential stream. Within a lane the low 16 bits hold codes of even input features and the
// high 16 bits their odd neighbours at the same positions: a pair of codes, as the bf16 dot product wants them.
#pragma once

#include <cstdint>

namespace neuqi {

constexpr int kTile = 16;
constexpr int kBlock = 32;
constexpr int kPairs = kBlock / 2;
constexpr int kRegisterBytes = 64;

// Bits [source, source + width) of the codes of pair `pair` lie at bit `position` of both halves of register `index`.
struct Slice {
  uint8_t index, position, pair, source, width;
};

template <int B>
struct Layout {
  static constexpr int kPerHalf = 16 / B;
  static constexpr int kSlices = kPairs;
  static constexpr Slice slice(int i) {
    return {uint8_t(i / kPerHalf), uint8_t(B * (i % kPerHalf)), uint8_t(i), 0, B};
  }
};

// Three registers hold five codes of 3 bits in each half and one spare bit: together the sixteenth code. The spare bit
// is the highest of the first two registers and the lowest of the third, so that the three meet in one table index.
template <>
struct Layout<3> {
  static constexpr int kSlices = kPairs + 2;
  static constexpr Slice slice(int i) {
    if (i < 15) return {uint8_t(i / 5), uint8_t(3 * (i % 5) + (i / 5 == 2)), uint8_t(i), 0, 3};
    return {uint8_t(i - 15), uint8_t(i == 17 ? 0 : 15), 15, uint8_t(i - 15), 1};
  }
};

enum Kind { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

inline constexpr int kind_bytes(int kind) { return kind == kFloat32 ? 4 : 2; }

// Sizes of one packed matrix.
struct Geometry {
  int64_t n, k, group;
  int bits, scale_kind;

  constexpr int64_t tiles() const { return (n + kTile - 1) / kTile; }
  constexpr int64_t groups() const { return k / group; }
  constexpr int64_t blocks() const { return group / kBlock; }
  constexpr int64_t header_bytes() const { return 2 * kTile * kind_bytes(scale_kind); }
  constexpr int64_t chunk_bytes() const { return header_bytes() + blocks() * bits * kRegisterBytes; }
  constexpr int64_t tile_bytes() const { return groups() * chunk_bytes(); }
};

struct GemmArgs {
  Geometry geometry;
  const uint8_t* weights;
  const void* x;
  const void* bias;
  void* y;
  int64_t m;
  int x_kind, bias_kind, threads;
};

}  // namespace neuqi
