// The search for the scale and zero-point of as many groups at once as a vector has lanes.
//
// Over-relaxed alternating least squares from a grid of starts: for fixed codes the best parameters are a regression of
// the weights on the codes, for fixed parameters the best codes are a rounding. The sums of a pass give the exact loss
// of its codes at their best parameters as well, so that starts compete at no further cost. The slow twin is
// neuqi_serve/quant/fast.py, which explains the steps; the definition is neuqi_serve/quant/scale_search.py.
//
// Included by quantize_driver.h after `Lanes`. No lane looks at another, sums run through the group in order, and the
// compiler may not contract: a group's result depends on nothing but the group, in every instruction set alike.
#pragma once

#include "quantize.h"

namespace neuqi {
namespace {

using Floats = Lanes::Floats;
using Mask = Lanes::Mask;

constexpr int kStarts = Lanes::kStarts;
constexpr int kMostKept = 64;
// Phases are compared among so many neighbours before the best goes to the pool.
constexpr int kNeighbours = 4;
// Codes hardly vary below this variance: all of them are equal but for rounding.
constexpr float kLeastVariance = 1e-12f;
constexpr float kSmallestRatio = 0.01f, kLargestRatio = 0.9f;
constexpr float kLongestStep = 4.0f;

// Groups of `size` weights, element by element: `weight` [size][lanes] of mean 0, `mass` likewise, of mean 1, unless
// all are 1. `top`: the largest code.
struct Tile {
  const float* weight;
  const float* mass;
  int64_t size;
  float top;
};

// Parameters, and what they take off the mean square of the weights.
struct Point {
  Floats scale, zero, gain;
};

inline Point choose(Mask mask, const Point& a, const Point& b) {
  return {Lanes::choose(mask, a.scale, b.scale), Lanes::choose(mask, a.zero, b.zero),
          Lanes::choose(mask, a.gain, b.gain)};
}

inline void keep_better(Point& best, const Point& other) {
  best = choose(Lanes::less(best.gain, other.gain), other, best);
}

// The best points, best first.
struct Pool {
  int size;
  Point points[kMostKept];

  void clear(int count) {
    size = count;
    for (int i = 0; i < count; ++i) points[i] = {Lanes::set(1.0f), Lanes::set(0.0f), Lanes::set(-1.0f)};
  }

  void insert(Point point) {
    if (!Lanes::any(Lanes::less(points[size - 1].gain, point.gain))) return;
    for (int i = 0; i < size; ++i) {
      Mask better = Lanes::less(points[i].gain, point.gain);
      Point old = points[i];
      points[i] = choose(better, point, old);
      point = choose(better, old, point);
    }
  }
};

// Regressions of the weights on the codes of S starts.
template <bool Weighted, int S>
inline void regress(const Tile& tile, const Floats* scale, const Floats* zero, Point* fitted) {
  const Floats nil = Lanes::set(0.0f), top = Lanes::set(tile.top);
  Floats inverse[S], shift[S], first[S], second[S], cross[S];
  for (int k = 0; k < S; ++k) {
    inverse[k] = Lanes::div(Lanes::set(1.0f), scale[k]);
    shift[k] = zero[k];
    first[k] = second[k] = cross[k] = nil;
  }
  for (int64_t i = 0; i < tile.size; ++i) {
    const Floats weight = Lanes::load(tile.weight + i * Lanes::kCount);
    const Floats mass = Weighted ? Lanes::load(tile.mass + i * Lanes::kCount) : nil;
    _Pragma("GCC unroll 4") for (int k = 0; k < S; ++k) {
      Floats code = Lanes::fma(weight, inverse[k], shift[k]);
      code = Lanes::round(Lanes::min(Lanes::max(code, nil), top));
      const Floats weighted = Weighted ? Lanes::mul(mass, code) : code;
      first[k] = Lanes::add(first[k], weighted);
      second[k] = Lanes::fma(weighted, code, second[k]);
      cross[k] = Lanes::fma(weighted, weight, cross[k]);
    }
  }
  const Floats share = Lanes::set(1.0f / float(tile.size));
  for (int k = 0; k < S; ++k) {
    const Floats mean = Lanes::mul(first[k], share), product = Lanes::mul(cross[k], share);
    const Floats variance = Lanes::fnma(mean, mean, Lanes::mul(second[k], share));
    const Mask fits = Lanes::both(Lanes::less(Lanes::set(kLeastVariance), variance), Lanes::less(nil, product));
    const Floats slope = Lanes::div(product, variance);
    fitted[k] = choose(fits, Point{slope, mean, Lanes::mul(slope, product)}, Point{scale[k], shift[k], nil});
  }
}

// Moves a start `overshoot` times as far as the regression says.
inline void advance(Floats& scale, Floats& zero, const Point& fitted, float overshoot) {
  const Floats factor = Lanes::set(overshoot);
  scale = Lanes::max(Lanes::fma(factor, Lanes::sub(fitted.scale, scale), scale),
                     Lanes::mul(Lanes::set(0.5f), fitted.scale));
  zero = Lanes::fma(factor, Lanes::sub(fitted.zero, zero), zero);
}

// `passes` regressions from each of kStarts starts; the best of each goes to `best` where it is better.
template <bool Weighted>
inline void refine(const Tile& tile, Floats* scale, Floats* zero, int passes, float overshoot, Point* best) {
  Point fitted[kStarts];
  for (int pass = 0; pass < passes; ++pass) {
    regress<Weighted, kStarts>(tile, scale, zero, fitted);
    for (int k = 0; k < kStarts; ++k) {
      keep_better(best[k], fitted[k]);
      advance(scale[k], zero[k], fitted[k], overshoot);
    }
  }
}

template <bool Weighted>
void refine_pool(const Tile& tile, Pool& pool, int passes, float overshoot) {
  for (int first = 0; first < pool.size; first += kStarts) {
    Floats scale[kStarts], zero[kStarts];
    Point best[kStarts];
    for (int k = 0; k < kStarts; ++k) {
      best[k] = pool.points[first + k < pool.size ? first + k : pool.size - 1];
      scale[k] = best[k].scale;
      zero[k] = best[k].zero;
    }
    refine<Weighted>(tile, scale, zero, passes, overshoot, best);
    for (int k = 0; k < kStarts && first + k < pool.size; ++k) pool.points[first + k] = best[k];
  }
}

// A Newton step towards the zero-point that balances what lies below the first code against what lies above the last:
// the minimum of the paper's surrogate, which is convex. 0 where nothing does.
template <bool Weighted>
inline Floats centring_step(const Tile& tile, Floats inverse, Floats zero) {
  const Floats nil = Lanes::set(0.0f), one = Lanes::set(1.0f), top = Lanes::set(tile.top);
  const Floats low = Lanes::set(-0.5f), high = Lanes::set(tile.top + 0.5f);
  Floats slope = nil, curvature = nil;
  for (int64_t i = 0; i < tile.size; ++i) {
    const Floats step = Lanes::fma(Lanes::load(tile.weight + i * Lanes::kCount), inverse, zero);
    const Floats mass = Weighted ? Lanes::load(tile.mass + i * Lanes::kCount) : one;
    const Mask below = Lanes::less(step, low), above = Lanes::less(high, step);
    const Floats outside = Lanes::choose(below, mass, Lanes::choose(above, mass, nil));
    slope = Lanes::fma(outside, Lanes::choose(above, Lanes::sub(step, top), step), slope);
    curvature = Lanes::add(curvature, outside);
  }
  const Floats move = Lanes::div(slope, Lanes::max(curvature, Lanes::set(1e-6f)));
  return Lanes::min(Lanes::max(move, Lanes::set(-kLongestStep)), Lanes::set(kLongestStep));
}

struct Extent {
  Floats low, high, square;
};

template <bool Weighted>
Extent extent(const Tile& tile) {
  Extent result{Lanes::load(tile.weight), Lanes::load(tile.weight), Lanes::set(0.0f)};
  for (int64_t i = 0; i < tile.size; ++i) {
    const Floats weight = Lanes::load(tile.weight + i * Lanes::kCount);
    const Floats weighted = Weighted ? Lanes::mul(weight, Lanes::load(tile.mass + i * Lanes::kCount)) : weight;
    result.low = Lanes::min(result.low, weight);
    result.high = Lanes::max(result.high, weight);
    result.square = Lanes::fma(weighted, weight, result.square);
  }
  return result;
}

// All starts: scales in geometric progression down from Min-Max's, and at each of them `phases` zero-points around
// the balanced one. The best of every few neighbours go to the pool.
template <bool Weighted>
void scan(const Tile& tile, const QuantizePlan& plan, Pool& pool) {
  const Floats middle = Lanes::set(0.5f * tile.top);
  const Extent range = extent<Weighted>(tile);
  const Floats span = Lanes::sub(range.high, range.low);
  const Floats spread = Lanes::sqrt(Lanes::mul(range.square, Lanes::set(1.0f / float(tile.size))));
  Floats factor = Lanes::div(Lanes::mul(Lanes::set(plan.narrowest), spread), span);
  factor = Lanes::min(Lanes::max(factor, Lanes::set(kSmallestRatio)), Lanes::set(kLargestRatio));
  for (int i = 0; i < plan.halvings; ++i) factor = Lanes::sqrt(factor);
  Floats scale = Lanes::div(span, Lanes::set(tile.top));
  Floats centre = Lanes::mul(Lanes::set(0.5f), Lanes::add(range.high, range.low));
  for (int index = 0; index <= 1 << plan.halvings; ++index, scale = Lanes::mul(scale, factor)) {
    const Floats inverse = Lanes::div(Lanes::set(1.0f), scale);
    Floats zero = Lanes::fnma(centre, inverse, middle);
    for (int i = 0; i < plan.centring; ++i) zero = Lanes::sub(zero, centring_step<Weighted>(tile, inverse, zero));
    // The next scale starts from the same centre, in units of the weight.
    centre = Lanes::mul(Lanes::sub(middle, zero), scale);
    Point best{scale, zero, Lanes::set(-1.0f)};
    for (int phase = 0; phase < plan.phases; phase += kStarts) {
      Floats scales[kStarts], zeros[kStarts];
      Point points[kStarts];
      for (int k = 0; k < kStarts; ++k) {
        const float shift = ((float(phase + k) + 0.5f) / float(plan.phases) - 0.5f) * plan.window;
        scales[k] = scale;
        zeros[k] = Lanes::add(zero, Lanes::set(shift));
        points[k] = {scale, zeros[k], Lanes::set(-1.0f)};
      }
      refine<Weighted>(tile, scales, zeros, plan.refinements, plan.overshoot, points);
      for (int k = 0; k < kStarts; ++k) {
        if ((phase + k) % kNeighbours == 0)
          best = points[k];
        else
          keep_better(best, points[k]);
        if ((phase + k) % kNeighbours == kNeighbours - 1) pool.insert(best);
      }
    }
  }
}

template <bool Weighted>
void search(const Tile& tile, const QuantizePlan& plan, Pool& pool) {
  pool.clear(plan.kept[0]);
  scan<Weighted>(tile, plan, pool);
  for (int stage = 0; stage < kStages; ++stage) {
    if (stage) {
      const Pool old = pool;
      pool.clear(plan.kept[stage]);
      for (int i = 0; i < old.size; ++i) pool.insert(old.points[i]);
    }
    refine_pool<Weighted>(tile, pool, plan.passes[stage], plan.overshoot);
  }
}

}  // namespace
}  // namespace neuqi
