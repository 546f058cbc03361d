// Codes of one row and one block of 32 input features: canonical words, quads (a code in each byte), lanes of registers.
// Static, because each file is compiled for another CPU.
#pragma once

#include <cstring>

#include "layout.h"
#include "scalar.h"

namespace neuqi {
namespace {

// Eight quads from the B canonical words of a block.
template <int B>
inline void quads_of_words(const uint32_t* words, uint32_t (&quads)[kQuads]) {
#pragma GCC unroll 8
  for (int quad = 0; quad < kQuads; ++quad) {
    const int bit = 4 * B * quad;
    uint64_t both = words[bit / 32];
    if (bit % 32 + 4 * B > 32) both |= uint64_t(words[bit / 32 + 1]) << 32;
    // Four neighbours of B bits become two of 16 bits, and these four bytes.
    constexpr uint32_t kOne = (1u << B) - 1, kTwo = (1u << 2 * B) - 1, kInHalves = kOne | kOne << 16;
    const uint32_t four = uint32_t(both >> bit % 32);
    const uint32_t halves = (four & kTwo) | (four >> 2 * B & kTwo) << 16;
    const uint32_t spread = (halves & kInHalves) | (halves >> B & kInHalves) << 8;
    quads[quad] = spread;
  }
}

constexpr uint32_t in_every_byte(uint32_t mask) { return mask * 0x01010101u; }

// The row's lane of each of the block's registers.
template <int B>
inline void pack_lane(const uint32_t (&quads)[kQuads], uint8_t* lane, int64_t register_stride) {
  uint32_t packed[B] = {};
#pragma GCC unroll 16
  for (int i = 0; i < Layout<B>::kSlices; ++i) {
    const Slice slice = Layout<B>::slice(i);
    const uint32_t mask = in_every_byte((1u << slice.width) - 1);
    packed[slice.index] |= (quads[slice.quad] >> slice.source & mask) << slice.position;
  }
#pragma GCC unroll 8
  for (int r = 0; r < B; ++r) std::memcpy(lane + r * register_stride, &packed[r], 4);
}

template <int B>
inline void unpack_lane(const uint8_t* lane, int64_t register_stride, uint32_t (&quads)[kQuads]) {
  uint32_t packed[B];
#pragma GCC unroll 8
  for (int r = 0; r < B; ++r) std::memcpy(&packed[r], lane + r * register_stride, 4);
  for (uint32_t& quad : quads) quad = 0;
#pragma GCC unroll 16
  for (int i = 0; i < Layout<B>::kSlices; ++i) {
    const Slice slice = Layout<B>::slice(i);
    const uint32_t mask = in_every_byte((1u << slice.width) - 1);
    quads[slice.quad] |= (packed[slice.index] >> slice.position & mask) << slice.source;
  }
}

// (q − zero)·scale of row `row` of a tile in block `block` of group `g`: 32 numbers.
template <int B>
inline void dequantize_block(const Geometry& geometry, const Position& position, const uint8_t* tiles, int64_t g,
                             int64_t block, int64_t row, float* weight) {
  const uint8_t* header = tiles + position.header + g * position.group_stride;
  const uint8_t* codes = tiles + position.codes + g * position.group_stride + block * position.block_stride;
  const float scale = load_scalar(header, row, geometry.scale_kind);
  const float zero = load_scalar(header, kTile + row, geometry.scale_kind);
  uint32_t quads[kQuads];
  unpack_lane<B>(codes + 4 * row, position.register_stride, quads);
  for (int i = 0; i < kBlock; ++i) weight[i] = (float(quads[i / 4] >> 8 * (i % 4) & 0xFF) - zero) * scale;
}

}  // namespace
}  // namespace neuqi
