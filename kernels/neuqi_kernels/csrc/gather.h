// Rows of a tiled matrix, de-quantized: the lookup of an embedding whose weights are packed.
#pragma once

#include "layout.h"

namespace neuqi {

// Writes row `ids[i]` as `y [i, 0..k)` in the type of `y_kind`, i below `count`. Returns false, and leaves `y` as it may
// be, when an id is not below geometry.n.
bool gather(const Geometry& geometry, const uint8_t* tiles, const int64_t* ids, int64_t count, void* y, int y_kind,
            int threads);

}  // namespace neuqi
