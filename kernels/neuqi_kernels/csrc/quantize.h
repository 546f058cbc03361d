// The quantizer: from a matrix of weights to codes, scales and zero-points. One function per instruction set; all of
// them give the same bits, because every group is a lane of its own and all operations are rounded alike.
#pragma once

#include <cstdint>

#include "layout.h"

namespace neuqi {

constexpr int kStages = 3;

// Where the search begins and how the starts are thinned out; `SearchPlan` of neuqi_kernels/search_plan.py.
struct QuantizePlan {
  int32_t halvings, phases, centring, refinements;
  int32_t kept[kStages], passes[kStages];
  int32_t final_passes;
  float window, overshoot, narrowest;
};

struct QuantizeArgs {
  const void* weight;       // [rows, columns], rows `stride` elements apart
  const float* importance;  // [columns], of mean 1 in every group, or null for ones
  uint32_t* qweight;        // [rows, columns * bits / 32], the canonical layout
  void* scale;              // [rows, columns / group]
  void* zero;
  int64_t rows, columns, stride, group;
  int bits, kind, storage, threads;
  const QuantizePlan* plan;

  int64_t groups_per_row() const { return columns / group; }
  int64_t groups() const { return rows * groups_per_row(); }
};

enum QuantizeResult { kQuantized = 0, kUnusableWeight = 1, kOutOfMemory = 2 };

QuantizeResult quantize_avx512(const QuantizeArgs& args);
QuantizeResult quantize_avx2(const QuantizeArgs& args);
QuantizeResult quantize_portable(const QuantizeArgs& args);

}  // namespace neuqi
