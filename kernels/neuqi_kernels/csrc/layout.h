// The tile layout: how the kernels see a packed matrix.
//
// Sixteen output rows form a tile, one row per 32-bit lane; four tiles form a strip (the last strip may have fewer).
// Each (strip, group) is one contiguous chunk:
//
//     per tile: [scale of 16 rows][zero-point of 16 rows]
//     per block of 32 input features: for each of its `bits` registers: per tile: [64 bytes, 16 lanes]
//
// so that a strip is a single sequential stream, which hardware prefetches best, and its tiles share the activations
// that a kernel has loaded. The four bytes of a lane hold codes of four neighbouring input features at the same bit
// positions: a quad, as the dot product of bytes wants it.
#pragma once

#include <cstdint>

namespace neuqi {

constexpr int kTile = 16;
constexpr int kStrip = 4;
constexpr int kBlock = 32;
constexpr int kQuads = kBlock / 4;
constexpr int kRegisterBytes = 64;
// Input features whose activations share one fixed-point scale; a group of weights has one or more such segments.
constexpr int kMostSegment = 128;

// Bits [source, source + width) of the codes of quad `quad` lie at bit `position` of the bytes of register `index`.
struct Slice {
  uint8_t index, position, quad, source, width;
};

template <int B>
struct Layout {
  static constexpr int kPerByte = 8 / B;
  static constexpr int kSlices = kQuads;
  static constexpr Slice slice(int i) {
    return {uint8_t(i / kPerByte), uint8_t(B * (i % kPerByte)), uint8_t(i), 0, B};
  }
};

// A byte of three registers holds two codes each and two spare bits: the spare bits of the first two are the upper two
// bits of the seventh and eighth code, whose lowest bits are the spare bits of the third.
template <>
struct Layout<3> {
  static constexpr int kSlices = kQuads + 2;
  static constexpr Slice slice(int i) {
    if (i < 6) return {uint8_t(i / 2), uint8_t(3 * (i % 2)), uint8_t(i), 0, 3};
    if (i < 8) return {uint8_t(i - 6), 6, uint8_t(i), 1, 2};
    return {2, uint8_t(i - 2), uint8_t(i - 2), 0, 1};
  }
};

enum Kind { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

inline constexpr int kind_bytes(int kind) { return kind == kFloat32 ? 4 : 2; }

// Where a tile lies, in bytes: its first header and codes, and the distances from group to group, block to block and
// register to register. The next tile of the strip has its header one header further and its codes one register further.
// `ahead`: how far ahead of the bytes in use the stream is asked for, whole groups where they are short.
struct Position {
  int64_t header, codes, group_stride, block_stride, register_stride, ahead;
};

// Enough for a core to wait for nothing between its reads: less does not cover the latency of the memory.
constexpr int64_t kAheadBytes = 8192;

// Sizes of one packed matrix.
struct Geometry {
  int64_t n, k, group;
  int bits, scale_kind;

  constexpr int64_t tiles() const { return (n + kTile - 1) / kTile; }
  constexpr int64_t groups() const { return k / group; }
  constexpr int64_t blocks() const { return group / kBlock; }
  // The largest of 128, 64 and 32 that divides a group.
  constexpr int64_t segment() const { return group % kMostSegment == 0 ? kMostSegment : group % 64 == 0 ? 64 : kBlock; }
  constexpr int64_t segments() const { return k / segment(); }
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
    int64_t stride = width * chunk_bytes();
    return {start + (tile - first) * header_bytes(),
            start + width * header_bytes() + (tile - first) * kRegisterBytes,
            stride,
            width * block_bytes(),
            width * kRegisterBytes,
            stride < kAheadBytes ? (kAheadBytes + stride - 1) / stride * stride : kAheadBytes};
  }
};

struct GemmArgs {
  Geometry geometry;
  const uint8_t* weights;
  const void* x;
  const void* bias;
  void* y;
  int64_t m;
  int x_kind, bias_kind, threads, y_kind;
  // The row of `x` behind each of the m rows, where they are not the rows of `x` in order.
  const int32_t* rows;

  int64_t source(int64_t row) const { return rows ? rows[row] : row; }
};

// How the two halves of a row of the first product become one; see activation_value in gated.cpp.
enum Activation { kSilu = 0, kGelu = 1, kGeluTanh = 2, kSwigluOai = 3, kActivationCount = 4 };

// The experts of a layer: Ŵ₁ [2·intermediate, hidden] and Ŵ₂ [hidden, intermediate] of each, one after the other.
// `ids [tokens, top_k]`: experts, negative where another rank has them; `weights`: what each counts.
struct ExpertsArgs {
  Geometry first, second;
  const uint8_t *first_tiles, *second_tiles;
  const void *first_bias, *second_bias;
  const void* x;
  const int32_t* ids;
  const float* weights;
  void* y;
  int64_t tokens, top_k, experts;
  int kind, bias_kind, activation, threads;
};

}  // namespace neuqi
