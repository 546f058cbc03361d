// What every instruction set shares: panels of tokens, the order of the work, its distribution over threads.
// Everything is static: the file is compiled once per instruction set and the copies must not be merged.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "layout.h"
#include "scalar.h"
#include "team.h"

namespace neuqi {
namespace {

// Tokens whose prepared activations exist at once: bounds the scratch memory of a long prompt.
constexpr int64_t kChunkTokens = 256;
// Input features that one preparation task covers at least.
constexpr int64_t kPrepareFeatures = 1024;
// Input features that are unpacked at once when several panels use them: their bf16 codes stay in the L1 cache.
constexpr int64_t kMostSpan = 256;

// Tokens that one call of a kernel multiplies. A row is a part of a token: an activation that needs several parts
// counts as several tokens.
struct Panel {
  int64_t first_token, first_row;
  int tokens, rows;
};

template <class V>
struct Job {
  const GemmArgs& args;
  int64_t first_token, tokens;
  int parts = 1, panel_tokens = 1, unit_tiles = 1;
  // `span`: input features per sum of activations; a whole group, or a part of it when spans are unpacked once.
  int64_t panels = 0, span = 0, spans_per_task = 1, tasks_per_panel = 1, units = 0;
  // Prepared activations [span][panel][…][row of the panel], and their sums [span][row].
  typename V::X* xs = nullptr;
  float* sums = nullptr;
  std::atomic<int64_t> next_task{0}, finished_tasks{0}, next_unit{0};

  int64_t rows() const { return tokens * parts; }
  int most_rows() const { return panel_tokens * parts; }
  Panel panel(int64_t index) const {
    int64_t first = index * panel_tokens;
    int count = int(std::min<int64_t>(panel_tokens, tokens - first));
    return {first_token + first, first * parts, count, count * parts};
  }
  typename V::X* span_xs(int64_t index, const Panel& panel) const {
    return xs + (index * rows() + panel.first_row) * (span / kBlock) * V::kXPerBlock;
  }
  float* span_sums(int64_t index, const Panel& panel) const { return sums + index * rows() + panel.first_row; }
};

// Activations in the order in which the kernel wants them, and their sum over each span, for the zero-points.
template <class V>
void prepare_task(const Job<V>& job, int64_t task) {
  const int64_t k = job.args.geometry.k;
  int64_t first = task % job.tasks_per_panel * job.spans_per_task;
  int64_t last = std::min(first + job.spans_per_task, k / job.span);
  Panel panel = job.panel(task / job.tasks_per_panel);
  for (int token = 0; token < panel.tokens; ++token)
    for (int64_t span = first; span < last; ++span)
      V::prepare_span(job.args.x, (panel.first_token + token) * k + span * job.span, job.args.x_kind,
                      job.span / kBlock, job.parts, panel.rows, job.span_xs(span, panel) + token * job.parts,
                      job.span_sums(span, panel) + token * job.parts);
}

// Sums the parts of each token of a panel, adds the bias and writes the rows of one tile that exist.
template <class V>
void write_tile(const Job<V>& job, const Panel& panel, int64_t first, const float* bias, const float* y) {
  const GemmArgs& args = job.args;
  int count = int(std::min<int64_t>(kTile, args.geometry.n - first));
  int64_t index = panel.first_token * args.geometry.n + first;
  for (int token = 0; token < panel.tokens; ++token, index += args.geometry.n, y += job.parts * kTile)
    V::store(args.y, index, args.x_kind, y, job.parts, bias, count);
}

template <class V>
void multiply_unit(const Job<V>& job, int64_t unit) {
  const Geometry& geometry = job.args.geometry;
  int64_t tile = unit * job.unit_tiles;
  int64_t last = std::min(tile + job.unit_tiles, geometry.tiles());
  alignas(64) float y[V::kMostFloats];
  for (int count; tile < last; tile += count) {
    count = V::tiles_at_once(job.most_rows(), last - tile);
    V::multiply(job, job.args.weights + tile * geometry.tile_bytes(), count, y);
    for (int i = 0; i < count; ++i) {
      int64_t first = (tile + i) * kTile;
      alignas(64) float bias[kTile] = {};
      for (int lane = 0; job.args.bias && lane < kTile && first + lane < geometry.n; ++lane)
        bias[lane] = load_scalar(job.args.bias, first + lane, job.args.bias_kind);
      for (int64_t index = 0; index < job.panels; ++index) {
        Panel panel = job.panel(index);
        write_tile(job, panel, first, bias, y + (panel.first_row * count + i * panel.rows) * kTile);
      }
    }
  }
}

// Threads take tasks from a counter, so a thread that the system stops for a while does not hold up the others, and
// the result does not depend on who computes what.
template <class V>
void work(void* data) {
  auto& job = *static_cast<Job<V>*>(data);
  int64_t tasks = job.panels * job.tasks_per_panel;
  for (int64_t task; (task = job.next_task.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
    prepare_task(job, task);
    job.finished_tasks.fetch_add(1, std::memory_order_release);
  }
  while (job.finished_tasks.load(std::memory_order_acquire) < tasks) V::pause();
  for (int64_t unit; (unit = job.next_unit.fetch_add(1, std::memory_order_relaxed)) < job.units;)
    multiply_unit(job, unit);
}

template <class V>
void multiply_chunk(const GemmArgs& args, int64_t first_token, int64_t tokens, void* scratch, int64_t xs_bytes) {
  const Geometry& geometry = args.geometry;
  Job<V> job{args, first_token, tokens};
  job.parts = V::parts(args.x_kind);
  int64_t most = V::kMostRows / job.parts;
  job.panels = (tokens + most - 1) / most;
  job.panel_tokens = int((tokens + job.panels - 1) / job.panels);
  job.span = V::span(geometry.group, job.panels);
  job.spans_per_task = std::max<int64_t>(1, kPrepareFeatures / job.span);
  job.tasks_per_panel = (geometry.k / job.span + job.spans_per_task - 1) / job.spans_per_task;
  job.unit_tiles = V::tiles_at_once(job.most_rows(), V::kMostTiles);
  while (job.unit_tiles > 1 && geometry.tiles() < int64_t(job.unit_tiles) * args.threads * 2) job.unit_tiles /= 2;
  job.units = (geometry.tiles() + job.unit_tiles - 1) / job.unit_tiles;
  job.xs = static_cast<typename V::X*>(scratch);
  job.sums = reinterpret_cast<float*>(static_cast<char*>(scratch) + xs_bytes);
  team_run(work<V>, &job, int(std::min<int64_t>(args.threads, job.units)));
}

// The largest part of a group that is at most kMostSpan features, in whole blocks.
inline int64_t part_of_group(int64_t group) {
  int64_t blocks = group / kBlock, parts = (group + kMostSpan - 1) / kMostSpan;
  while (blocks % parts) ++parts;
  return group / parts;
}

// Returns false when memory for the prepared activations cannot be had.
template <class V>
bool gemm(const GemmArgs& args) {
  const Geometry& geometry = args.geometry;
  int64_t tokens = std::min(args.m, kChunkTokens);
  int64_t rows = tokens * V::parts(args.x_kind);
  int64_t xs_bytes = rows * (geometry.k / kBlock) * V::kXPerBlock * int64_t(sizeof(typename V::X));
  xs_bytes = (xs_bytes + 63) / 64 * 64;
  int64_t sums = rows * (geometry.k / V::span(geometry.group, args.m));
  int64_t bytes = (xs_bytes + sums * int64_t(sizeof(float)) + 63) / 64 * 64;
  void* scratch = std::aligned_alloc(64, size_t(bytes));
  if (!scratch) return false;
  for (int64_t first = 0; first < args.m; first += kChunkTokens)
    multiply_chunk<V>(args, first, std::min(kChunkTokens, args.m - first), scratch, xs_bytes);
  std::free(scratch);
  return true;
}

}  // namespace
}  // namespace neuqi
