// What every instruction set shares: panels of tokens, the order of the work, its distribution over threads.
// Everything is static: the file is compiled once per instruction set and the copies must not be merged.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "layout.h"
#include "scalar.h"
#include "team.h"

namespace neuqi {
namespace {

// Rows (tokens times parts) whose prepared activations exist at once: bounds the scratch memory of a long prompt.
constexpr int64_t kChunkRows = 256;
// Input features that one preparation task covers at least.
constexpr int64_t kPrepareFeatures = 1024;
// Weights of a strip that several panels use in turn.
constexpr int64_t kPassBytes = 256 << 10;
// Rounds of waiting for another thread's preparation before the core is offered to it.
constexpr int kMostSpins = 2000;
// Threads that may have a range of the work of their own; more share these.
constexpr int kMostRanges = 64;

// Tokens that one call of a kernel multiplies. A row is a part of a token: an activation that needs several parts
// counts as several tokens.
struct Panel {
  int64_t first_token, first_row;
  int tokens, rows;
};

// Units of work of one thread, until others help; on a cache line of its own.
struct alignas(64) Range {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

template <class V>
struct Job {
  const GemmArgs& args;
  int64_t first_token, tokens;
  int parts = 1, panel_tokens = 1, unit_tiles = kStrip;
  int64_t panels = 0, groups_per_task = 1, tasks_per_panel = 1, units = 0;
  // Prepared activations [group][panel][…][row of the panel], and their sums [group][row].
  typename V::X* xs = nullptr;
  float* sums = nullptr;
  std::atomic<int64_t> next_task{0}, finished_tasks{0};
  int ranges = 1;
  std::atomic<int> next_range{0};
  Range range[kMostRanges] = {};

  int64_t rows() const { return tokens * parts; }
  Panel panel(int64_t index) const {
    int64_t first = index * panel_tokens;
    int count = int(std::min<int64_t>(panel_tokens, tokens - first));
    return {first_token + first, first * parts, count, count * parts};
  }
  typename V::X* group_xs(int64_t g, const Panel& panel) const {
    return xs + (g * rows() + panel.first_row) * args.geometry.blocks() * V::kXPerBlock;
  }
  float* group_sums(int64_t g, const Panel& panel) const { return sums + g * rows() + panel.first_row; }
};

// Activations in the order in which the kernel wants them, and their sum over each group, for the zero-points.
template <class V>
void prepare_task(const Job<V>& job, int64_t task) {
  const Geometry& geometry = job.args.geometry;
  int64_t first = task % job.tasks_per_panel * job.groups_per_task;
  int64_t last = std::min(first + job.groups_per_task, geometry.groups());
  Panel panel = job.panel(task / job.tasks_per_panel);
  for (int token = 0; token < panel.tokens; ++token)
    for (int64_t g = first; g < last; ++g)
      V::prepare_group(job.args.x, (panel.first_token + token) * geometry.k + g * geometry.group, job.args.x_kind,
                       geometry.blocks(), job.parts, panel.rows, job.group_xs(g, panel) + token * job.parts,
                       job.group_sums(g, panel) + token * job.parts);
}

// Sums the parts of each token, adds the bias and writes the rows of `count` tiles that exist. Neighbouring tiles of a
// token share a cache line, so they are written one after the other.
template <class V>
void write_tiles(const Job<V>& job, int64_t tile, int count, const float* y) {
  const GemmArgs& args = job.args;
  alignas(64) float bias[V::kMostTiles * kTile] = {};
  int64_t first = tile * kTile, features = std::min<int64_t>(count * kTile, args.geometry.n - first);
  if (args.bias)
    for (int64_t i = 0; i < features; ++i) bias[i] = load_scalar(args.bias, first + i, args.bias_kind);
  for (int64_t index = 0; index < job.panels; ++index) {
    Panel panel = job.panel(index);
    const float* rows = y + panel.first_row * count * kTile;
    for (int token = 0; token < panel.tokens; ++token)
      for (int i = 0; i < count; ++i)
        V::store(args.y, (panel.first_token + token) * args.geometry.n + first + i * kTile, args.x_kind,
                 rows + (i * panel.rows + token * job.parts) * kTile, job.parts, bias + i * kTile,
                 int(std::min<int64_t>(kTile, features - i * kTile)));
  }
}

// All panels against `count` tiles. Several panels take a few groups at a time, whose weights stay in the L2 cache.
template <class V>
void multiply_tiles(const Job<V>& job, const Position& position, int count, float* y) {
  const int64_t groups = job.args.geometry.groups();
  int64_t at_once = job.panels == 1 ? groups : std::max<int64_t>(1, kPassBytes / position.group_stride);
  std::fill_n(y, job.rows() * count * kTile, 0.0f);
  for (int64_t first = 0; first < groups; first += at_once)
    for (int64_t index = 0; index < job.panels; ++index) {
      Panel panel = job.panel(index);
      V::multiply(job, panel, position, count, first, std::min(first + at_once, groups),
                  y + panel.first_row * count * kTile);
    }
}

template <class V>
void multiply_unit(const Job<V>& job, int64_t unit) {
  const Geometry& geometry = job.args.geometry;
  int64_t tile = unit * job.unit_tiles;
  int64_t last = std::min(tile + job.unit_tiles, geometry.tiles());
  alignas(64) float y[V::kMostTiles * kChunkRows * kTile];
  for (int count; tile < last; tile += count) {
    count = int(std::min<int64_t>(std::min(last, geometry.strip_end(tile)) - tile, V::kMostTiles));
    if (count == 3) count = 2;
    multiply_tiles(job, geometry.position(tile), count, y);
    write_tiles(job, tile, count, y);
  }
}

// Each thread walks through a range of its own, one long stream of weights, and then helps with the others: a thread
// that the system stops for a while does not hold up the rest, any number of threads may come, and the result does not
// depend on who computes what.
template <class V>
void work(void* data) {
  auto& job = *static_cast<Job<V>*>(data);
  int64_t tasks = job.panels * job.tasks_per_panel;
  for (int64_t task; (task = job.next_task.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
    prepare_task(job, task);
    job.finished_tasks.fetch_add(1, std::memory_order_release);
  }
  for (int spins = 0; job.finished_tasks.load(std::memory_order_acquire) < tasks; ++spins)
    spins < kMostSpins ? V::pause() : void(sched_yield());
  int first = job.next_range.fetch_add(1, std::memory_order_relaxed);
  for (int i = 0; i < job.ranges; ++i) {
    Range& range = job.range[(first + i) % job.ranges];
    for (int64_t unit; (unit = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;)
      multiply_unit(job, unit);
  }
}

template <class V>
void multiply_chunk(const GemmArgs& args, int64_t first_token, int64_t tokens, void* scratch, int64_t xs_bytes) {
  const Geometry& geometry = args.geometry;
  Job<V> job{args, first_token, tokens};
  job.parts = V::parts(args.x_kind);
  int64_t most = V::kMostRows / job.parts;
  job.panels = (tokens + most - 1) / most;
  job.panel_tokens = int((tokens + job.panels - 1) / job.panels);
  job.groups_per_task = std::max<int64_t>(1, kPrepareFeatures / geometry.group);
  job.tasks_per_panel = (geometry.groups() + job.groups_per_task - 1) / job.groups_per_task;
  // Parts of a strip where there are too few strips for all threads.
  job.unit_tiles = kStrip;
  while (job.unit_tiles > 1 && geometry.tiles() < int64_t(job.unit_tiles) * args.threads * 2) job.unit_tiles /= 2;
  job.units = (geometry.tiles() + job.unit_tiles - 1) / job.unit_tiles;
  job.xs = static_cast<typename V::X*>(scratch);
  job.sums = reinterpret_cast<float*>(static_cast<char*>(scratch) + xs_bytes);
  int threads = int(std::min<int64_t>(args.threads, job.units));
  job.ranges = std::max(1, std::min(threads, kMostRanges));
  for (int i = 0; i < job.ranges; ++i) {
    job.range[i].next = job.units * i / job.ranges;
    job.range[i].end = job.units * (i + 1) / job.ranges;
  }
  team_run(work<V>, &job, threads);
}

// Returns false when memory for the prepared activations cannot be had.
template <class V>
bool gemm(const GemmArgs& args) {
  const Geometry& geometry = args.geometry;
  const int64_t chunk = kChunkRows / V::parts(args.x_kind);
  int64_t rows = std::min(args.m, chunk) * V::parts(args.x_kind);
  int64_t xs_bytes = rows * (geometry.k / kBlock) * V::kXPerBlock * int64_t(sizeof(typename V::X));
  xs_bytes = (xs_bytes + 63) / 64 * 64;
  int64_t bytes = (xs_bytes + rows * geometry.groups() * int64_t(sizeof(float)) + 63) / 64 * 64;
  void* scratch = std::aligned_alloc(64, size_t(bytes));
  if (!scratch) return false;
  for (int64_t first = 0; first < args.m; first += chunk)
    multiply_chunk<V>(args, first, std::min(chunk, args.m - first), scratch, xs_bytes);
  std::free(scratch);
  return true;
}

}  // namespace
}  // namespace neuqi
