// The experts of a layer: both products, the activation between them and the weighted sum, in one parallel region.
//
// A route is a token at one of its experts. Routes are sorted by expert, so that an expert's are rows in a row; only
// experts with routes are visited. The threads go through five phases together:
//
//     prepare x for every route → first products → activation, prepare h → second products → sum over a token's routes
//
// Neither the number of threads nor the instruction set changes a bit: each number is made by the driver's kernels and
// by gated.cpp in a fixed order.
#pragma once

#include "driver.h"
#include "gated.h"

namespace neuqi {
namespace {

// Scratch memory that exists at once: small enough for the allocator to keep it between calls.
constexpr int64_t kExpertsScratchBytes = 24 << 20;
constexpr int64_t kLeastExpertsTokens = 32;
// Elements of a result that one task sums at least.
constexpr int64_t kSumElements = 1024;
// Routes of a token.
constexpr int64_t kMostRoutes = 64;
constexpr int64_t kAlignment = 64;

// Hands out aligned parts of one block; without a block it only counts.
struct Arena {
  uint8_t* memory;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* at = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
    used += (count * int64_t(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return at;
  }
};

// One of the two products of all visited experts: `of[i]` is that of the i-th, `panels[p]` says whose panel p is.
struct Products {
  Product* of;
  int64_t* first_panel;
  int64_t visited = 0, panels = 0, tiles = 0, units_each = 0;
  int unit_tiles = 1;
  MultiplyTiles multiply;

  int64_t tasks() const { return visited ? panels * of[0].tasks_per_panel : 0; }
  // The product that a preparation task belongs to; the task becomes one of that product.
  const Product& find(int64_t& task) const {
    const int64_t panel = task / of[0].tasks_per_panel;
    const int64_t i = std::upper_bound(first_panel, first_panel + visited, panel) - first_panel - 1;
    task -= first_panel[i] * of[0].tasks_per_panel;
    return of[i];
  }
  void run(int64_t unit) const {
    const Product& product = of[unit / units_each];
    multiply(product, unit_of(product.args.geometry, unit % units_each, unit_tiles));
  }
};

struct ExpertsJob {
  const ExpertsArgs& args;
  int64_t first_token, tokens;
  // Per route in sorted order: its token. Per route in the order of `ids`: its row in the sorted order, or -1.
  int32_t *token_of, *row_of;
  // Results of the first products [row, 2·intermediate], of the activation [row, intermediate] in the type of x, and of
  // the second products [row, hidden].
  float *pairs, *out;
  uint8_t* h;
  // Whether the first products all have the same single row: then it is prepared once.
  bool one_row = false;
  Products first, second;
  std::atomic<bool> any_broken{false};
  Tasks prepare, activate, sum;
  Units first_units, second_units;

  int64_t sums_per_token() const { return (args.second.n + kSumElements - 1) / kSumElements; }
};

// Room for the prepared activations of `routes` rows.
struct Prepared {
  int32_t* xs;
  float *steps, *sums;
  std::atomic<uint8_t>* broken;

  Prepared(Arena& arena, const Geometry& geometry, int64_t routes, int parts)
      : xs(arena.take<int32_t>(routes * (geometry.k / 4) * parts)),
        steps(arena.take<float>(routes * geometry.segments())),
        sums(arena.take<float>(routes * geometry.segments())),
        broken(arena.take<std::atomic<uint8_t>>(routes)) {}

  void place(Product& product, int64_t row, int parts) const {
    const Geometry& geometry = product.args.geometry;
    product.xs = xs + row * (geometry.k / 4) * parts;
    product.steps = steps + row * geometry.segments();
    product.sums = sums + row * geometry.segments();
    product.broken = broken + row;
    for (int64_t token = 0; token < product.tokens; ++token) product.broken[token].store(0, std::memory_order_relaxed);
  }
};

// Sorts the routes by expert, in the order of the tokens; leaves in `starts[e]` where the routes of expert e end.
inline void sort_routes(ExpertsJob& job, int64_t* starts) {
  const ExpertsArgs& args = job.args;
  const int32_t* ids = args.ids + job.first_token * args.top_k;
  const int64_t routes = job.tokens * args.top_k;
  std::fill_n(starts, args.experts + 1, int64_t(0));
  for (int64_t route = 0; route < routes; ++route)
    if (ids[route] >= 0) ++starts[ids[route] + 1];
  for (int64_t e = 0; e < args.experts; ++e) starts[e + 1] += starts[e];
  for (int64_t route = 0; route < routes; ++route) {
    job.row_of[route] = -1;
    if (ids[route] < 0) continue;
    // From here on `starts[e]` is where the next route of expert e goes.
    const int64_t row = starts[ids[route]]++;
    job.row_of[route] = int32_t(row);
    job.token_of[row] = int32_t(job.first_token + route / args.top_k);
  }
}

// Experts with routes; `starts` as sort_routes leaves it.
inline int64_t count_visited(const ExpertsArgs& args, const int64_t* starts) {
  int64_t visited = 0;
  for (int64_t e = 0, row = 0; e < args.experts; row = starts[e], ++e) visited += starts[e] > row;
  return visited;
}

template <class O>
void add_product(ExpertsJob& job, Products& products, const GemmArgs& args, const Prepared& prepared, int64_t row) {
  Product product{args, 0, args.m};
  product.any_broken = &job.any_broken;
  product.divide(O::most_rows(parts_of(args.x_kind)));
  prepared.place(product, row, parts_of(args.x_kind));
  products.first_panel[products.visited] = products.panels;
  products.panels += product.panels;
  products.of[products.visited++] = product;
}

inline const void* element(const void* data, int64_t index, int kind) {
  return data ? static_cast<const uint8_t*>(data) + index * kind_bytes(kind) : nullptr;
}

template <class O>
void finish_products(Products& products, const Geometry& geometry, int parts, int threads) {
  products.multiply = multiply_for<O>(geometry.bits, parts);
  products.unit_tiles = tiles_per_unit(geometry.tiles() * products.visited, threads);
  products.units_each = (geometry.tiles() + products.unit_tiles - 1) / products.unit_tiles;
}

template <class O>
void add_experts(ExpertsJob& job, const int64_t* starts, const Prepared& x, const Prepared& h) {
  const ExpertsArgs& args = job.args;
  const Geometry &first = args.first, &second = args.second;
  const int64_t first_bytes = first.tiles() * first.tile_bytes(), second_bytes = second.tiles() * second.tile_bytes();
  for (int64_t e = 0, row = 0; e < args.experts; row = starts[e], ++e) {
    const int64_t count = starts[e] - row;
    if (!count) continue;
    add_product<O>(job, job.first,
                   {first, args.first_tiles + e * first_bytes, args.x, element(args.first_bias, e * first.n, args.bias_kind),
                    job.pairs + row * first.n, count, args.kind, args.bias_kind, args.threads, kFloat32,
                    job.token_of + row},
                   x, job.one_row ? 0 : row);
    add_product<O>(job, job.second,
                   {second, args.second_tiles + e * second_bytes, job.h + row * second.k * kind_bytes(args.kind),
                    element(args.second_bias, e * second.n, args.bias_kind), job.out + row * second.n, count, args.kind,
                    args.bias_kind, args.threads, kFloat32, nullptr},
                   h, row);
  }
}

// Activation of some segments of one row, rounded to the type of x, and their fixed-point form.
inline void activate_rows(const ExpertsJob& job, const Product& product, const Panel& panel, int row, int64_t first,
                          int64_t last) {
  const Geometry& geometry = product.args.geometry;
  const int64_t size = geometry.segment(), token = panel.first + row;
  auto* h = static_cast<uint8_t*>(const_cast<void*>(product.args.x));
  const int64_t at = (static_cast<const uint8_t*>(product.args.x) - job.h) / kind_bytes(job.args.kind) / geometry.k;
  const float* pairs = job.pairs + (at + token) * 2 * geometry.k;
  float values[kMostSegment];
  for (int64_t segment = first; segment < last; ++segment) {
    gate(job.args.activation, pairs, geometry.k, segment * size, size, values);
    store_floats(h, token * geometry.k + segment * size, job.args.kind, values, int(size));
    prepare_row(product, panel, row, segment);
  }
}

inline void sum_token(const ExpertsJob& job, int64_t task) {
  const ExpertsArgs& args = job.args;
  const int64_t each = job.sums_per_token(), token = task / each, first = task % each * kSumElements;
  const int64_t count = std::min(kSumElements, args.second.n - first);
  const float* rows[kMostRoutes];
  for (int64_t route = 0; route < args.top_k; ++route) {
    const int64_t row = job.row_of[token * args.top_k + route];
    rows[route] = row < 0 ? nullptr : job.out + row * args.second.n + first;
  }
  float values[kSumElements];
  const int64_t at = job.first_token + token;
  weighted_sum(rows, args.weights + at * args.top_k, args.top_k, count, values);
  store_floats(args.y, at * args.second.n + first, args.kind, values, int(count));
}

template <class O>
void work_on_experts(void* data) {
  auto& job = *static_cast<ExpertsJob*>(data);
  share<O>(job.prepare, [&](int64_t task) {
    const Product& product = job.one_row ? job.first.of[0] : job.first.find(task);
    prepare_rows(product, task);
  });
  walk(job.first_units, [&](int64_t unit) { job.first.run(unit); });
  wait_for<O>(job.first_units.tasks);
  share<O>(job.activate, [&](int64_t task) {
    const Product& product = job.second.find(task);
    prepare_task(product, task, [&](const Panel& panel, int row, int64_t first, int64_t last) {
      activate_rows(job, product, panel, row, first, last);
    });
  });
  walk(job.second_units, [&](int64_t unit) { job.second.run(unit); });
  wait_for<O>(job.second_units.tasks);
  share<O>(job.sum, [&](int64_t task) { sum_token(job, task); });
}

// Lays out the scratch memory of some tokens; with an arena that only counts, nothing else happens.
template <class O>
void run_experts_chunk(const ExpertsArgs& args, int64_t first_token, int64_t tokens, Arena& arena) {
  const int64_t routes = tokens * args.top_k, most = std::min(args.experts, routes);
  const int parts = parts_of(args.kind);
  ExpertsJob job{args, first_token, tokens};
  job.token_of = arena.take<int32_t>(routes);
  job.row_of = arena.take<int32_t>(routes);
  auto* starts = arena.take<int64_t>(args.experts + 1);
  for (Products* products : {&job.first, &job.second}) {
    products->of = arena.take<Product>(most);
    products->first_panel = arena.take<int64_t>(most);
  }
  const Prepared x(arena, args.first, routes, parts), h(arena, args.second, routes, parts);
  job.pairs = arena.take<float>(routes * args.first.n);
  job.out = arena.take<float>(routes * args.second.n);
  job.h = arena.take<uint8_t>(routes * args.second.k * kind_bytes(args.kind));
  if (!arena.memory) return;
  sort_routes(job, starts);
  // A token may come to an expert more than once, as far as this is concerned.
  job.one_row = tokens == 1 && count_visited(args, starts) == starts[args.experts];
  add_experts<O>(job, starts, x, h);
  finish_products<O>(job.first, args.first, parts, args.threads);
  finish_products<O>(job.second, args.second, parts, args.threads);
  const int64_t units = job.first.units_each * job.first.visited;
  const int threads = int(std::max<int64_t>(1, std::min<int64_t>(args.threads, units)));
  job.prepare.count = job.one_row && job.first.visited ? job.first.of[0].tasks_per_panel : job.first.tasks();
  job.activate.count = job.second.tasks();
  job.sum.count = tokens * job.sums_per_token();
  job.first_units.divide(units, threads);
  job.second_units.divide(job.second.units_each * job.second.visited, threads);
  team_run(work_on_experts<O>, &job, threads);
}

// Returns 1 when scratch memory cannot be had, 2 when an id is not below the number of experts.
template <class O>
int experts(const ExpertsArgs& args) {
  for (int64_t route = 0; route < args.tokens * args.top_k; ++route)
    if (args.ids[route] >= args.experts) return 2;
  if (!args.tokens) return 0;
  Arena one{nullptr};
  run_experts_chunk<O>(args, 0, 1, one);
  const int64_t most = std::max(kLeastExpertsTokens, kExpertsScratchBytes / one.used);
  const int64_t chunks = (args.tokens + most - 1) / most, chunk = (args.tokens + chunks - 1) / chunks;
  Arena needed{nullptr};
  run_experts_chunk<O>(args, 0, chunk, needed);
  auto* memory = static_cast<uint8_t*>(std::aligned_alloc(kAlignment, size_t(needed.used)));
  if (!memory) return 1;
  for (int64_t first = 0; first < args.tokens; first += chunk) {
    Arena arena{memory};
    run_experts_chunk<O>(args, first, std::min(chunk, args.tokens - first), arena);
  }
  std::free(memory);
  return 0;
}

}  // namespace
}  // namespace neuqi
