// The tile layout: how the kernels see a packed matrix.
//
// Sixteen output rows form a tile, one row per 32-bit lane; four tiles form a strip (the last strip may have fewer).
// Each (strip, group) is one contiguous chunk:
//
//     per tile: [scale of 16 rows][zero-point of 16 rows]
//     per block of 32 input features: for each of its `bits` registers: per tile: [64 bytes, 16 lanes]
//
// so that a strip is a single sequential stream, which hardware prefetches best, and its tiles share the activations
// that a kernel has loaded. Within a lane the low 16 bits hold codes of even input features and the high 16 bits their
// odd neighbours at the same positions: a pair of codes, as the bf16 dot product wants them.
#pragma once

#include <cstdint>

namespace neuqi {

constexpr int kTile = 16;
constexpr int kStrip = 4;
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

// Where a tile lies, in bytes: its first header and codes, and the distances from group to group, block to block and
// register to register. The next tile of the strip has its header one header further and its codes one register further.
struct Position {
  int64_t header, codes, group_stride, block_stride, register_stride;
};

// Sizes of one packed matrix.
struct Geometry {
  int64_t n, k, group;
  int bits, scale_kind;

  constexpr int64_t tiles() const { return (n + kTile - 1) / kTile; }
  constexpr int64_t groups() const { return k / group; }
  constexpr int64_t blocks() const { return group / kBlock; }
  constexpr int64_t header_bytes() const { return 2 * kTile * kind_bytes(scale_kind); }
  constexpr int64_t block_bytes() const { return int64_t(bits) * kRegisterBytes; }
  constexpr int64_t chunk_bytes() const { return header_bytes() + blocks() * block_bytes(); }
  constexpr int64_t tile_bytes() const { return groups() * chunk_bytes(); }
  constexpr int64_t strip_end(int64_t tile) const {
    int64_t end = (tile / kStrip + 1) * kStrip;
    return end < tiles() ? end : tiles();
  }
  constexpr Position position(int64_t tile) const {
    int64_t first = tile / kStrip * kStrip, width = strip_end(tile) - first, start = first * tile_bytes();
    return {start + (tile - first) * header_bytes(), start + width * header_bytes() + (tile - first) * kRegisterBytes,
            width * chunk_bytes(), width * block_bytes(), width * kRegisterBytes};
  }
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
