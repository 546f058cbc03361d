// Canonical bit streams into tiles, and tiles into float32 weights.
#pragma once

#include "layout.h"

namespace neuqi {

// `qweight [n, k·bits/32]`, `scale, zero [n, k/group]` of the geometry's kind; `tiles`: geometry.tiles() streams.
void repack(const Geometry& geometry, const uint32_t* qweight, const void* scale, const void* zero, uint8_t* tiles,
            int threads);

// Writes (q − zero)·scale into `weight [n, k]`.
void dequantize(const Geometry& geometry, const uint8_t* tiles, float* weight, int threads);

}  // namespace neuqi
