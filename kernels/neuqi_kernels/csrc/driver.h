// What every instruction set shares: panels of tokens, the order of the work, its distribution over threads.
// Everything is static: the file is compiled once per instruction set and the copies must not be merged.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "codes.h"
#include "multiply.h"
#include "team.h"

namespace neuqi {
namespace {

// Bytes of prepared activations that exist at once, as every thread reads all of them for every strip of weights, and
// the fewest tokens that one pass over the weights serves.
constexpr int64_t kChunkBytes = 4 << 20;
constexpr int64_t kLeastChunkTokens = 126;
// Input features that one preparation task covers at least.
constexpr int64_t kPrepareFeatures = 1024;
// Tokens whose sums are in the first-level cache while a strip of weights passes by.
constexpr int kBatchTokens = 24;
// Rounds of waiting for another thread's preparation before the core is offered to it.
constexpr int kMostSpins = 2000;
// Threads that may have a range of the work of their own; more share these.
constexpr int kMostRanges = 64;

// Tokens that one call of a kernel multiplies: its rows.
struct Panel {
  int64_t first;
  int rows;
};

// Units of work of one thread, until others help; on a cache line of its own.
struct alignas(64) Range {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

struct Job {
  const GemmArgs& args;
  int64_t first_token, tokens;
  int64_t panels = 0, panel_tokens = 1, segments_per_task = 1, tasks_per_panel = 1, units = 0;
  int unit_tiles = kStrip;
  // Digits [segment][panel][quad][part][row of the panel]; steps and sums [segment][token].
  int32_t* xs = nullptr;
  float *steps = nullptr, *sums = nullptr;
  // Whether a token has activations that are not finite, and whether any has.
  std::atomic<uint8_t>* broken = nullptr;
  std::atomic<bool> any_broken{false};
  std::atomic<int64_t> next_task{0}, finished_tasks{0};
  int ranges = 1;
  std::atomic<int> next_range{0};
  Range range[kMostRanges] = {};

  Panel panel(int64_t index) const {
    int64_t first = index * panel_tokens;
    return {first, int(std::min(panel_tokens, tokens - first))};
  }
  int32_t* panel_xs(int64_t segment, const Panel& panel) const {
    return xs + (segment * tokens + panel.first) * (args.geometry.segment() / 4) * parts_of(args.x_kind);
  }
  Activations activations(int64_t segment, const Panel& panel) const {
    const int64_t at = segment * tokens + panel.first;
    return {panel_xs(segment, panel), steps + at, sums + at};
  }
};

// A few tiles of one strip, and where they lie.
struct Tiles {
  int64_t first;
  int count;
  Position position;
};

inline void prepare_task(Job& job, int64_t task) {
  const GemmArgs& args = job.args;
  const Geometry& geometry = args.geometry;
  const int64_t first = task % job.tasks_per_panel * job.segments_per_task, size = geometry.segment();
  const int64_t last = std::min(first + job.segments_per_task, geometry.segments());
  const Panel panel = job.panel(task / job.tasks_per_panel);
  const int parts = parts_of(args.x_kind);
  for (int row = 0; row < panel.rows; ++row) {
    const int64_t token = panel.first + row;
    for (int64_t s = first; s < last; ++s) {
      const int64_t index = (job.first_token + token) * geometry.k + s * size, at = s * job.tokens + token;
      int32_t* xs = job.panel_xs(s, panel) + row;
      const bool finite =
          parts == 2 ? prepare_segment<2>(args.x, index, args.x_kind, size, panel.rows, xs, job.steps + at, job.sums + at)
                     : prepare_segment<3>(args.x, index, args.x_kind, size, panel.rows, xs, job.steps + at, job.sums + at);
      if (finite) continue;
      job.broken[token].store(1, std::memory_order_relaxed);
      job.any_broken.store(true, std::memory_order_relaxed);
    }
  }
}

template <class O, int B, int P, int R>
void multiply_vectors(const Position& position, const uint8_t* codes, int64_t blocks, const uint8_t* header, int vectors,
                    int kind, const Activations& x, int64_t rows, float* y) {
  constexpr int T = O::vectors(R, P);
  int v = 0;
  for (; v + T <= vectors; v += T)
    multiply<O, B, P, R, T>(position, codes + v * 4 * O::kLanes, blocks, header, v, kind, x, rows,
                                   y + v * rows * O::kLanes);
  if constexpr (T > 1)
    for (; v < vectors; ++v)
      multiply<O, B, P, R, 1>(position, codes + v * 4 * O::kLanes, blocks, header, v, kind, x, rows,
                                     y + v * rows * O::kLanes);
}

using MultiplyVectors = void (*)(const Position&, const uint8_t*, int64_t, const uint8_t*, int, int, const Activations&,
                               int64_t, float*);
template <class O, int B, int P>
MultiplyVectors by_rows(int rows) {
  constexpr int kMost = O::most_rows(P);
  switch (rows) {
    case 1: return multiply_vectors<O, B, P, 1>;
    case 2: return multiply_vectors<O, B, P, 2>;
    case 3: return multiply_vectors<O, B, P, 3>;
    case 4: return multiply_vectors<O, B, P, 4>;
    case 5: return multiply_vectors<O, B, P, std::min(5, kMost)>;
    default: return multiply_vectors<O, B, P, kMost>;
  }
}

// The segments of some tiles, one after the other: where their codes and their header are.
struct Segment {
  const uint8_t *codes, *header;
  int64_t blocks;
};

inline Segment segment_of(const Job& job, const Tiles& tiles, int64_t s) {
  const Geometry& geometry = job.args.geometry;
  const Position& position = tiles.position;
  const int64_t per_group = geometry.group / geometry.segment(), blocks = geometry.segment() / kBlock;
  const uint8_t* group = job.args.weights + s / per_group * position.group_stride;
  return {group + position.codes + s % per_group * blocks * position.block_stride, group + position.header, blocks};
}

// Codes are unpacked in registers and used at once, for each panel anew.
template <class O, int B, int P>
void multiply_panels(const Job& job, const Tiles& tiles, int64_t first_panel, int64_t last_panel, int64_t rows,
                            float* y) {
  const int64_t first_token = job.panel(first_panel).first;
  for (int64_t s = 0; s < job.args.geometry.segments(); ++s) {
    const Segment segment = segment_of(job, tiles, s);
    for (int64_t index = first_panel; index < last_panel; ++index) {
      const Panel panel = job.panel(index);
      by_rows<O, B, P>(panel.rows)(tiles.position, segment.codes, segment.blocks, segment.header,
                                          tiles.count * (kTile / O::kLanes), job.args.geometry.scale_kind,
                                          job.activations(s, panel), rows, y + (panel.first - first_token) * O::kLanes);
    }
  }
}

// One row of one token as torch computes it, term by term: for activations that are not finite.
template <int B>
float multiply_plainly(const GemmArgs& args, const Position& position, int64_t row, int64_t token) {
  const Geometry& geometry = args.geometry;
  float y = 0.0f, weight[kBlock], x[kBlock];
  for (int64_t block = 0; block < geometry.k / kBlock; ++block) {
    dequantize_block<B>(geometry, position, args.weights, block / geometry.blocks(), block % geometry.blocks(), row,
                        weight);
    load_floats(args.x, token * geometry.k + block * kBlock, args.x_kind, kBlock, x);
    for (int i = 0; i < kBlock; ++i) y += x[i] * weight[i];
  }
  return y;
}

inline void store_floats(void* y, int64_t index, int kind, const float* values, int count) {
  if (kind == kFloat32) {
    std::memcpy(static_cast<float*>(y) + index, values, size_t(count) * 4);
    return;
  }
  uint16_t* halves = static_cast<uint16_t*>(y) + index;
  if (kind == kBfloat16)
    for (int i = 0; i < count; ++i) halves[i] = float_to_bfloat(values[i]);
  else
    for (int i = 0; i < count; ++i) halves[i] = float_to_half(values[i]);
}

// Adds the bias and writes the rows that exist.
template <class O, int B>
void write_tiles(const Job& job, const Tiles& tiles, int64_t first_token, int64_t rows, const float* y) {
  const GemmArgs& args = job.args;
  const int64_t n = args.geometry.n, first = tiles.first * kTile;
  const int features = int(std::min<int64_t>(tiles.count * kTile, n - first));
  alignas(64) float bias[kStrip * kTile] = {}, values[kStrip * kTile];
  if (args.bias)
    for (int i = 0; i < features; ++i) bias[i] = load_scalar(args.bias, first + i, args.bias_kind);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = job.first_token + first_token + row;
    for (int v = 0; v < tiles.count * (kTile / O::kLanes); ++v)
      for (int lane = 0; lane < O::kLanes; ++lane)
        values[v * O::kLanes + lane] = y[(v * rows + row) * O::kLanes + lane] + bias[v * O::kLanes + lane];
    if (job.any_broken.load(std::memory_order_relaxed) &&
        job.broken[first_token + row].load(std::memory_order_relaxed))
      for (int i = 0; i < features; ++i)
        values[i] =
            multiply_plainly<B>(args, args.geometry.position(tiles.first + i / kTile), i % kTile, token) + bias[i];
    store_floats(args.y, token * n + first, args.x_kind, values, features);
  }
}

template <class O, int B, int P>
void multiply_tiles(const Job& job, const Tiles& tiles) {
  alignas(64) float y[kBatchTokens * kStrip * kTile];
  const int64_t most = kBatchTokens / job.panel_tokens, batches = (job.panels + most - 1) / most;
  const int64_t panels = (job.panels + batches - 1) / batches;
  for (int64_t first = 0; first < job.panels; first += panels) {
    const int64_t last = std::min(first + panels, job.panels), token = job.panel(first).first;
    const Panel end = job.panel(last - 1);
    const int64_t rows = end.first + end.rows - token;
    std::fill_n(y, rows * tiles.count * kTile, 0.0f);
    multiply_panels<O, B, P>(job, tiles, first, last, rows, y);
    write_tiles<O, B>(job, tiles, token, rows, y);
  }
}

template <class O, int B, int P>
void multiply_unit(const Job& job, int64_t unit) {
  const Geometry& geometry = job.args.geometry;
  const int64_t first = unit * job.unit_tiles;
  const int64_t last = std::min(first + job.unit_tiles, geometry.strip_end(first));
  multiply_tiles<O, B, P>(job, {first, int(last - first), geometry.position(first)});
}

// Each thread walks through a range of its own, one long stream of weights, and then helps with the others: a thread
// that the system stops for a while does not hold up the rest, any number of threads may come, and the result does not
// depend on who computes what.
template <class O, int B, int P>
void work(void* data) {
  auto& job = *static_cast<Job*>(data);
  int64_t tasks = job.panels * job.tasks_per_panel;
  for (int64_t task; (task = job.next_task.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
    prepare_task(job, task);
    job.finished_tasks.fetch_add(1, std::memory_order_release);
  }
  for (int spins = 0; job.finished_tasks.load(std::memory_order_acquire) < tasks; ++spins)
    spins < kMostSpins ? O::pause() : void(sched_yield());
  int first = job.next_range.fetch_add(1, std::memory_order_relaxed);
  for (int i = 0; i < job.ranges; ++i) {
    Range& range = job.range[(first + i) % job.ranges];
    for (int64_t unit; (unit = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;)
      multiply_unit<O, B, P>(job, unit);
  }
}

template <class O, int P>
auto work_for(int bits) {
  return bits == 2 ? work<O, 2, P> : bits == 3 ? work<O, 3, P> : bits == 4 ? work<O, 4, P> : work<O, 8, P>;
}

template <class O>
void multiply_chunk(const GemmArgs& args, int64_t first_token, int64_t tokens, void* scratch) {
  const Geometry& geometry = args.geometry;
  const int parts = parts_of(args.x_kind);
  Job job{args, first_token, tokens};
  const int64_t most = O::most_rows(parts);
  job.panels = (tokens + most - 1) / most;
  job.panel_tokens = (tokens + job.panels - 1) / job.panels;
  job.panels = (tokens + job.panel_tokens - 1) / job.panel_tokens;
  job.segments_per_task = std::max<int64_t>(1, kPrepareFeatures / geometry.segment());
  job.tasks_per_panel = (geometry.segments() + job.segments_per_task - 1) / job.segments_per_task;
  // Parts of a strip where there are too few strips for all threads.
  while (job.unit_tiles > 1 && geometry.tiles() < int64_t(job.unit_tiles) * args.threads * 2) job.unit_tiles /= 2;
  job.units = (geometry.tiles() + job.unit_tiles - 1) / job.unit_tiles;
  job.xs = static_cast<int32_t*>(scratch);
  job.steps = reinterpret_cast<float*>(job.xs + tokens * geometry.k / 4 * parts);
  job.sums = job.steps + tokens * geometry.segments();
  job.broken = reinterpret_cast<std::atomic<uint8_t>*>(job.sums + tokens * geometry.segments());
  for (int64_t token = 0; token < tokens; ++token) job.broken[token].store(0, std::memory_order_relaxed);
  int threads = int(std::min<int64_t>(args.threads, job.units));
  job.ranges = std::max(1, std::min(threads, kMostRanges));
  for (int i = 0; i < job.ranges; ++i) {
    job.range[i].next = job.units * i / job.ranges;
    job.range[i].end = job.units * (i + 1) / job.ranges;
  }
  team_run(parts == 2 ? work_for<O, 2>(geometry.bits) : work_for<O, 3>(geometry.bits), &job, threads);
}

// Returns false when memory for the prepared activations cannot be had.
template <class O>
bool gemm(const GemmArgs& args) {
  const Geometry& geometry = args.geometry;
  const int parts = parts_of(args.x_kind);
  // Chunks of about the same size, of whole panels.
  const int64_t most = std::max(kLeastChunkTokens, kChunkBytes / (geometry.k * parts));
  const int64_t chunks = (args.m + most - 1) / most, rows = O::most_rows(parts);
  const int64_t chunk = chunks > 1 ? ((args.m + chunks - 1) / chunks + rows - 1) / rows * rows : args.m;
  const int64_t bytes = chunk * (geometry.k * parts + geometry.segments() * 8 + 1);
  void* scratch = std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64);
  if (!scratch) return false;
  for (int64_t first = 0; first < args.m; first += chunk)
    multiply_chunk<O>(args, first, std::min(chunk, args.m - first), scratch);
  std::free(scratch);
  return true;
}

}  // namespace
}  // namespace neuqi
