// What lies between the products of experts. One object file serves every instruction set, which therefore get the same
// bits.
#pragma once

#include "layout.h"

namespace neuqi {

// `h[i]` = activation of the pair (gate, up) number `first + i` of `pairs [2·intermediate]`, for `count` of them. The
// gates are the first half, in `kSwigluOai` the even elements.
void gate(int activation, const float* pairs, int64_t intermediate, int64_t first, int64_t count, float* h);

// `y[i]` = Σ over the routes of a token in their order of weight · row[i]; a null row counts nothing.
void weighted_sum(const float* const* rows, const float* weights, int64_t routes, int64_t count, float* y);

}  // namespace neuqi
