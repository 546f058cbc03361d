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

// Tokens `first_token` to `first_token + tokens` of one product, and where their prepared activations are.
struct Product {
  GemmArgs args;
  int64_t first_token, tokens;
  int64_t panels = 0, panel_tokens = 1, segments_per_task = 1, tasks_per_panel = 1;
  // Digits [segment][panel][quad][part][row of the panel]; steps and sums [segment][token].
  int32_t* xs = nullptr;
  float *steps = nullptr, *sums = nullptr;
  // Whether a token has activations that are not finite, and whether any has.
  std::atomic<uint8_t>* broken = nullptr;
  std::atomic<bool>* any_broken = nullptr;

  // Panels of at most `most` tokens, of about the same size.
  void divide(int64_t most) {
    panels = (tokens + most - 1) / most;
    panel_tokens = (tokens + panels - 1) / panels;
    panels = (tokens + panel_tokens - 1) / panel_tokens;
    segments_per_task = std::max<int64_t>(1, kPrepareFeatures / args.geometry.segment());
    tasks_per_panel = (args.geometry.segments() + segments_per_task - 1) / segments_per_task;
  }
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

// Tasks that the threads share; each goes on when all are done.
struct Tasks {
  std::atomic<int64_t> next{0}, finished{0};
  int64_t count = 0;
};

// Units of work that stream weights: each thread walks through a range of its own, one long stream, and then helps with
// the others. A thread that the system stops for a while does not hold up the rest, any number of threads may come,
// and the result does not depend on who computes what.
struct Units {
  int ranges = 1;
  std::atomic<int> next_range{0};
  Range range[kMostRanges] = {};
  Tasks tasks;

  void divide(int64_t count, int threads) {
    tasks.count = count;
    ranges = std::max(1, std::min(threads, kMostRanges));
    for (int i = 0; i < ranges; ++i) {
      range[i].next = count * i / ranges;
      range[i].end = count * (i + 1) / ranges;
    }
  }
};

template <class O>
void wait_for(const Tasks& tasks) {
  for (int spins = 0; tasks.finished.load(std::memory_order_acquire) < tasks.count; ++spins)
    spins < kMostSpins ? O::pause() : void(sched_yield());
}

template <class O, class F>
void share(Tasks& tasks, F&& run) {
  for (int64_t task; (task = tasks.next.fetch_add(1, std::memory_order_relaxed)) < tasks.count;) {
    run(task);
    tasks.finished.fetch_add(1, std::memory_order_release);
  }
  wait_for<O>(tasks);
}

// Does not wait for the others.
template <class F>
void walk(Units& units, F&& run) {
  const int first = units.next_range.fetch_add(1, std::memory_order_relaxed);
  for (int i = 0; i < units.ranges; ++i) {
    Range& range = units.range[(first + i) % units.ranges];
    for (int64_t unit; (unit = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) {
      run(unit);
      units.tasks.finished.fetch_add(1, std::memory_order_release);
    }
  }
}

struct Job {
  Product product;
  int unit_tiles = kStrip;
  std::atomic<bool> any_broken{false};
  Tasks prepare;
  Units units;
};

// A few tiles of one strip, and where they lie.
struct Tiles {
  int64_t first;
  int count;
  Position position;
};

inline void prepare_row(const Product& product, const Panel& panel, int row, int64_t segment) {
  const GemmArgs& args = product.args;
  const int64_t token = panel.first + row, size = args.geometry.segment(), at = segment * product.tokens + token;
  const int64_t index = args.source(product.first_token + token) * args.geometry.k + segment * size;
  int32_t* xs = product.panel_xs(segment, panel) + row;
  float *step = product.steps + at, *sum = product.sums + at;
  const bool finite = parts_of(args.x_kind) == 2
                          ? prepare_segment<2>(args.x, index, args.x_kind, size, panel.rows, xs, step, sum)
                          : prepare_segment<3>(args.x, index, args.x_kind, size, panel.rows, xs, step, sum);
  if (finite) return;
  product.broken[token].store(1, std::memory_order_relaxed);
  product.any_broken->store(true, std::memory_order_relaxed);
}

// Calls `run(panel, row, first segment, last segment)` for the rows and segments of one preparation task.
template <class F>
void prepare_task(const Product& product, int64_t task, F&& run) {
  const int64_t first = task % product.tasks_per_panel * product.segments_per_task;
  const int64_t last = std::min(first + product.segments_per_task, product.args.geometry.segments());
  const Panel panel = product.panel(task / product.tasks_per_panel);
  for (int row = 0; row < panel.rows; ++row) run(panel, row, first, last);
}

inline void prepare_rows(const Product& product, int64_t task) {
  prepare_task(product, task, [&](const Panel& panel, int row, int64_t first, int64_t last) {
    for (int64_t segment = first; segment < last; ++segment) prepare_row(product, panel, row, segment);
  });
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

inline Segment segment_of(const Product& product, const Tiles& tiles, int64_t s) {
  const Geometry& geometry = product.args.geometry;
  const Position& position = tiles.position;
  const int64_t per_group = geometry.group / geometry.segment(), blocks = geometry.segment() / kBlock;
  const uint8_t* group = product.args.weights + s / per_group * position.group_stride;
  return {group + position.codes + s % per_group * blocks * position.block_stride, group + position.header, blocks};
}

// Codes are unpacked in registers and used at once, for each panel anew.
template <class O, int B, int P>
void multiply_panels(const Product& product, const Tiles& tiles, int64_t first_panel, int64_t last_panel, int64_t rows,
                            float* y) {
  const int64_t first_token = product.panel(first_panel).first;
  for (int64_t s = 0; s < product.args.geometry.segments(); ++s) {
    const Segment segment = segment_of(product, tiles, s);
    for (int64_t index = first_panel; index < last_panel; ++index) {
      const Panel panel = product.panel(index);
      by_rows<O, B, P>(panel.rows)(tiles.position, segment.codes, segment.blocks, segment.header,
                                          tiles.count * (kTile / O::kLanes), product.args.geometry.scale_kind,
                                          product.activations(s, panel), rows, y + (panel.first - first_token) * O::kLanes);
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
    load_floats(args.x, args.source(token) * geometry.k + block * kBlock, args.x_kind, kBlock, x);
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
void write_tiles(const Product& product, const Tiles& tiles, int64_t first_token, int64_t rows, const float* y) {
  const GemmArgs& args = product.args;
  const int64_t n = args.geometry.n, first = tiles.first * kTile;
  const int features = int(std::min<int64_t>(tiles.count * kTile, n - first));
  alignas(64) float bias[kStrip * kTile] = {}, values[kStrip * kTile];
  if (args.bias)
    for (int i = 0; i < features; ++i) bias[i] = load_scalar(args.bias, first + i, args.bias_kind);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = product.first_token + first_token + row;
    for (int v = 0; v < tiles.count * (kTile / O::kLanes); ++v)
      for (int lane = 0; lane < O::kLanes; ++lane)
        values[v * O::kLanes + lane] = y[(v * rows + row) * O::kLanes + lane] + bias[v * O::kLanes + lane];
    if (product.any_broken->load(std::memory_order_relaxed) &&
        product.broken[first_token + row].load(std::memory_order_relaxed))
      for (int i = 0; i < features; ++i)
        values[i] =
            multiply_plainly<B>(args, args.geometry.position(tiles.first + i / kTile), i % kTile, token) + bias[i];
    store_floats(args.y, token * n + first, args.y_kind, values, features);
  }
}

template <class O, int B, int P>
void multiply_tiles(const Product& product, const Tiles& tiles) {
  alignas(64) float y[kBatchTokens * kStrip * kTile];
  const int64_t most = kBatchTokens / product.panel_tokens, batches = (product.panels + most - 1) / most;
  const int64_t panels = (product.panels + batches - 1) / batches;
  for (int64_t first = 0; first < product.panels; first += panels) {
    const int64_t last = std::min(first + panels, product.panels), token = product.panel(first).first;
    const Panel end = product.panel(last - 1);
    const int64_t rows = end.first + end.rows - token;
    std::fill_n(y, rows * tiles.count * kTile, 0.0f);
    multiply_panels<O, B, P>(product, tiles, first, last, rows, y);
    write_tiles<O, B>(product, tiles, token, rows, y);
  }
}

// Unit `unit` of `unit_tiles` tiles.
inline Tiles unit_of(const Geometry& geometry, int64_t unit, int unit_tiles) {
  const int64_t first = unit * unit_tiles, last = std::min(first + unit_tiles, geometry.strip_end(first));
  return {first, int(last - first), geometry.position(first)};
}

using MultiplyTiles = void (*)(const Product&, const Tiles&);
template <class O, int P>
MultiplyTiles multiply_for(int bits) {
  return bits == 2   ? multiply_tiles<O, 2, P>
         : bits == 3 ? multiply_tiles<O, 3, P>
         : bits == 4 ? multiply_tiles<O, 4, P>
                     : multiply_tiles<O, 8, P>;
}
template <class O>
MultiplyTiles multiply_for(int bits, int parts) {
  return parts == 2 ? multiply_for<O, 2>(bits) : multiply_for<O, 3>(bits);
}

template <class O>
void work(void* data) {
  auto& job = *static_cast<Job*>(data);
  const GemmArgs& args = job.product.args;
  const MultiplyTiles multiply = multiply_for<O>(args.geometry.bits, parts_of(args.x_kind));
  share<O>(job.prepare, [&](int64_t task) { prepare_rows(job.product, task); });
  walk(job.units, [&](int64_t unit) { multiply(job.product, unit_of(args.geometry, unit, job.unit_tiles)); });
}

// Tiles of a unit: parts of a strip where there are too few strips for all threads.
inline int tiles_per_unit(int64_t tiles, int threads) {
  int unit = kStrip;
  while (unit > 1 && tiles < int64_t(unit) * threads * 2) unit /= 2;
  return unit;
}

template <class O>
void multiply_chunk(const GemmArgs& args, int64_t first_token, int64_t tokens, void* scratch) {
  const Geometry& geometry = args.geometry;
  const int parts = parts_of(args.x_kind);
  Job job{{args, first_token, tokens}};
  Product& product = job.product;
  product.divide(O::most_rows(parts));
  product.xs = static_cast<int32_t*>(scratch);
  product.steps = reinterpret_cast<float*>(product.xs + tokens * geometry.k / 4 * parts);
  product.sums = product.steps + tokens * geometry.segments();
  product.broken = reinterpret_cast<std::atomic<uint8_t>*>(product.sums + tokens * geometry.segments());
  product.any_broken = &job.any_broken;
  for (int64_t token = 0; token < tokens; ++token) product.broken[token].store(0, std::memory_order_relaxed);
  job.unit_tiles = tiles_per_unit(geometry.tiles(), args.threads);
  const int64_t units = (geometry.tiles() + job.unit_tiles - 1) / job.unit_tiles;
  const int threads = int(std::min<int64_t>(args.threads, units));
  job.prepare.count = product.panels * product.tasks_per_panel;
  job.units.divide(units, threads);
  team_run(work<O>, &job, threads);
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
