// Around the search: reading weights into tiles, long groups, rounding to what is stored, packing, threads.
//
// Included once per instruction set, after `Lanes`.
#pragma once

#include <atomic>
#include <cstdlib>

#include "quantize_search.h"
#include "quantize_storage.h"
#include "team.h"

namespace neuqi {
namespace {

constexpr int kLanes = Lanes::kCount;
// Groups longer than this are searched as a histogram of so many bins, and refined on their weights.
constexpr int64_t kLongestDirect = 512;
constexpr int kBins = 512;
constexpr int kFinalists = 4;
constexpr int kTilesAtOnce = 4;
constexpr float kSmallestSpan = 1e-30f;
// As LARGEST_WEIGHT of neuqi_serve/quant/storage.py; its bits order like the numbers.
constexpr float kLargestWeight = 1e18f;

// Arrays [size][lanes] of one thread.
struct Scratch {
  float* weight = nullptr;
  float* mass = nullptr;
  float* bin_weight = nullptr;
  float* bin_mass = nullptr;
  float* block = nullptr;

  bool allocate(const QuantizeArgs& args) {
    const size_t size = size_t(args.group);
    weight = array(size);
    if (args.importance) mass = array(size);
    if (args.group > kLongestDirect) {
      bin_weight = array(kBins);
      bin_mass = array(kBins);
    }
    block = array(kBlock);
    const bool bins = args.group <= kLongestDirect || (bin_weight && bin_mass);
    return weight && block && bins && (mass || !args.importance);
  }

  ~Scratch() {
    std::free(weight);
    std::free(mass);
    std::free(bin_weight);
    std::free(bin_mass);
    std::free(block);
  }

 private:
  static float* array(size_t size) {
    return static_cast<float*>(std::aligned_alloc(64, size * kLanes * sizeof(float)));
  }
};

// The groups of a tile; lanes past the end repeat the last group.
struct Place {
  const QuantizeArgs& args;
  int64_t first;

  int64_t group(int lane) const { return first + lane < args.groups() ? first + lane : args.groups() - 1; }
  int64_t row(int lane) const { return group(lane) / args.groups_per_row(); }
  int64_t column(int lane) const { return group(lane) % args.groups_per_row() * args.group; }
};

template <int Kind>
uint32_t read_lane(const void* data, int64_t start, int64_t size, float* out) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < size; ++i) {
    const float value = load_scalar(data, start + i, Kind);
    const uint32_t magnitude = to_bits(value) & 0x7FFFFFFF;
    largest = magnitude > largest ? magnitude : largest;
    out[i * kLanes] = value;
  }
  return largest;
}

// Reads the weights of a tile; false where one is not finite or too large.
bool read_weights(const Place& place, float* weight) {
  const QuantizeArgs& args = place.args;
  uint32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t start = place.row(lane) * args.stride + place.column(lane);
    const uint32_t found = args.kind == kFloat32   ? read_lane<kFloat32>(args.weight, start, args.group, weight + lane)
                           : args.kind == kFloat16 ? read_lane<kFloat16>(args.weight, start, args.group, weight + lane)
                                                   : read_lane<kBfloat16>(args.weight, start, args.group, weight + lane);
    largest = found > largest ? found : largest;
  }
  return largest <= to_bits(kLargestWeight);
}

void read_mass(const Place& place, float* mass) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const float* source = place.args.importance + place.column(lane);
    for (int64_t i = 0; i < place.args.group; ++i) mass[i * kLanes + lane] = source[i];
  }
}

// What normalisation took away: weight = centre + span · normalised.
struct Frame {
  Floats low, high, centre, span;
};

// Moves the weights of a tile to mean 0 and a range of 1. First by the middle of the range: far from 0, the mean of
// float32 weights is known only to the spacing of float32 there.
template <bool Weighted>
Frame normalize(const Scratch& scratch, const Tile& tile) {
  const Extent range = extent<Weighted>(tile);
  const Floats middle = Lanes::mul(Lanes::set(0.5f), Lanes::add(range.low, range.high));
  const Floats span = Lanes::max(Lanes::sub(range.high, range.low), Lanes::set(kSmallestSpan));
  const Floats inverse = Lanes::div(Lanes::set(1.0f), span);
  Floats sum = Lanes::set(0.0f);
  for (int64_t i = 0; i < tile.size; ++i) {
    float* place = scratch.weight + i * kLanes;
    const Floats weight = Lanes::mul(Lanes::sub(Lanes::load(place), middle), inverse);
    Lanes::store(place, weight);
    sum = Weighted ? Lanes::fma(weight, Lanes::load(tile.mass + i * kLanes), sum) : Lanes::add(sum, weight);
  }
  const Floats mean = Lanes::mul(sum, Lanes::set(1.0f / float(tile.size)));
  for (int64_t i = 0; i < tile.size; ++i) {
    float* place = scratch.weight + i * kLanes;
    Lanes::store(place, Lanes::sub(Lanes::load(place), mean));
  }
  return {range.low, range.high, Lanes::fma(mean, span, middle), span};
}

// A normalised tile's weights in kBins bins of equal width: their means, and their masses.
template <bool Weighted>
Tile histogram(const Scratch& scratch, const Tile& tile) {
  for (int64_t i = 0; i < int64_t(kBins) * kLanes; ++i) scratch.bin_weight[i] = scratch.bin_mass[i] = 0.0f;
  const Floats low = extent<Weighted>(tile).low, bins = Lanes::set(float(kBins)), last = Lanes::set(float(kBins - 1));
  const float share = float(kBins) / float(tile.size);
  alignas(64) float positions[kLanes];
  for (int64_t i = 0; i < tile.size; ++i) {
    const float* weight = tile.weight + i * kLanes;
    const Floats place = Lanes::mul(Lanes::sub(Lanes::load(weight), low), bins);
    Lanes::store(positions, Lanes::min(Lanes::max(place, Lanes::set(0.0f)), last));
    for (int lane = 0; lane < kLanes; ++lane) {
      const int bin = int(positions[lane]) * kLanes + lane;
      const float mass = Weighted ? share * tile.mass[i * kLanes + lane] : share;
      scratch.bin_mass[bin] += mass;
      scratch.bin_weight[bin] += mass * weight[lane];
    }
  }
  for (int64_t i = 0; i < int64_t(kBins) * kLanes; ++i)
    scratch.bin_weight[i] = scratch.bin_mass[i] > 0.0f ? scratch.bin_weight[i] / scratch.bin_mass[i] : 0.0f;
  return {scratch.bin_weight, scratch.bin_mass, kBins, tile.top};
}

// Means of the codes of each candidate under its stored scale: what its zero-point is fitted to.
template <bool Weighted>
void mean_codes(const Tile& tile, const Floats* inverse, const Floats* zero, int count, Floats* mean) {
  const Floats nil = Lanes::set(0.0f), top = Lanes::set(tile.top);
  for (int k = 0; k < count; ++k) {
    Floats sum = nil;
    for (int64_t i = 0; i < tile.size; ++i) {
      Floats code = Lanes::fma(Lanes::load(tile.weight + i * kLanes), inverse[k], zero[k]);
      code = Lanes::round(Lanes::min(Lanes::max(code, nil), top));
      sum = Weighted ? Lanes::fma(code, Lanes::load(tile.mass + i * kLanes), sum) : Lanes::add(sum, code);
    }
    mean[k] = Lanes::mul(sum, Lanes::set(1.0f / float(tile.size)));
  }
}

// Sum of squared errors of the weights as they are under stored parameters.
template <bool Weighted>
Floats stored_loss(const Tile& tile, Floats scale, Floats zero) {
  const Floats nil = Lanes::set(0.0f), top = Lanes::set(tile.top), inverse = Lanes::div(Lanes::set(1.0f), scale);
  Floats loss = nil;
  for (int64_t i = 0; i < tile.size; ++i) {
    const Floats weight = Lanes::load(tile.weight + i * kLanes);
    Floats code = Lanes::add(Lanes::mul(weight, inverse), zero);
    code = Lanes::round(Lanes::min(Lanes::max(code, nil), top));
    const Floats error = Lanes::sub(Lanes::mul(Lanes::sub(code, zero), scale), weight);
    const Floats weighted = Weighted ? Lanes::mul(error, Lanes::load(tile.mass + i * kLanes)) : error;
    loss = Lanes::fma(weighted, error, loss);
  }
  return loss;
}

// Candidates in their stored form, as float32, lane by lane.
struct Stored {
  int count = 0;
  alignas(64) float scale[kFinalists + 2][kLanes];
  alignas(64) float zero[kFinalists + 2][kLanes];
};

template <bool Weighted>
void round_candidates(const Tile& tile, const QuantizeArgs& args, const Frame& frame, const Pool& pool,
                      Stored& stored) {
  const int count = pool.size < kFinalists ? pool.size : kFinalists;
  Floats inverse[kFinalists], zero[kFinalists], mean[kFinalists];
  for (int k = 0; k < count; ++k) {
    float* scale = stored.scale[stored.count + k];
    Lanes::store(scale, Lanes::mul(pool.points[k].scale, frame.span));
    for (int lane = 0; lane < kLanes; ++lane) scale[lane] = stored_scale(scale[lane], args.storage);
    inverse[k] = Lanes::div(frame.span, Lanes::load(scale));
    zero[k] = pool.points[k].zero;
  }
  mean_codes<Weighted>(tile, inverse, zero, count, mean);
  for (int k = 0; k < count; ++k) {
    float* out = stored.zero[stored.count + k];
    Lanes::store(out, Lanes::sub(mean[k], Lanes::div(frame.centre, Lanes::load(stored.scale[stored.count + k]))));
    for (int lane = 0; lane < kLanes; ++lane) out[lane] = stored_zero(out[lane], args.storage);
  }
  stored.count += count;
}

// The candidate of least stored loss, of equal ones the first; a group of equal weights gets the constant.
template <bool Weighted>
void choose_stored(const Tile& tile, const QuantizeArgs& args, const Frame& frame, const Stored& stored, float* scale,
                   float* zero) {
  Floats best_scale = Lanes::load(stored.scale[0]), best_zero = Lanes::load(stored.zero[0]);
  Floats least = stored_loss<Weighted>(tile, best_scale, best_zero);
  for (int k = 1; k < stored.count; ++k) {
    const Floats other_scale = Lanes::load(stored.scale[k]), other_zero = Lanes::load(stored.zero[k]);
    const Floats loss = stored_loss<Weighted>(tile, other_scale, other_zero);
    const Mask better = Lanes::less(loss, least);
    best_scale = Lanes::choose(better, other_scale, best_scale);
    best_zero = Lanes::choose(better, other_zero, best_zero);
    least = Lanes::choose(better, loss, least);
  }
  Lanes::store(scale, best_scale);
  Lanes::store(zero, best_zero);
  alignas(64) float low[kLanes], high[kLanes];
  Lanes::store(low, frame.low);
  Lanes::store(high, frame.high);
  for (int lane = 0; lane < kLanes; ++lane)
    if (low[lane] == high[lane]) constant_params(low[lane], args.storage, scale[lane], zero[lane]);
}

// Codes of 32 weights at a time, packed and written to the rows of the result.
void write_codes(const Tile& tile, const Place& place, float* block, const float* scale, const float* zero) {
  const Floats step = Lanes::load(scale), shift = Lanes::load(zero), nil = Lanes::set(0.0f), top = Lanes::set(tile.top);
  const int bits = place.args.bits;
  const int64_t words = place.args.group * bits / 32, valid = place.args.groups() - place.first;
  for (int64_t start = 0; start < tile.size; start += kBlock) {
    for (int i = 0; i < kBlock; ++i) {
      Floats code = Lanes::add(Lanes::div(Lanes::load(tile.weight + (start + i) * kLanes), step), shift);
      Lanes::store(block + i * kLanes, Lanes::round(Lanes::min(Lanes::max(code, nil), top)));
    }
    uint32_t packed[9][kLanes] = {};
    for (int i = 0; i < kBlock; ++i) {
      const int word = i * bits / 32, position = i * bits % 32;
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint64_t code = uint64_t(block[i * kLanes + lane]) << position;
        packed[word][lane] |= uint32_t(code);
        packed[word + 1][lane] |= uint32_t(code >> 32);
      }
    }
    for (int lane = 0; lane < kLanes && lane < valid; ++lane) {
      uint32_t* out = place.args.qweight + (place.first + lane) * words + start * bits / 32;
      for (int word = 0; word < bits; ++word) out[word] = packed[word][lane];
    }
  }
}

template <bool Weighted>
bool quantize_tile(const Place& place, const Scratch& scratch) {
  const QuantizeArgs& args = place.args;
  if (!read_weights(place, scratch.weight)) return false;
  if (Weighted) read_mass(place, scratch.mass);
  const Tile tile{scratch.weight, scratch.mass, args.group, float((1 << args.bits) - 1)};
  const Frame frame = normalize<Weighted>(scratch, tile);
  Pool pool;
  if (args.group > kLongestDirect) {
    search<true>(histogram<Weighted>(scratch, tile), *args.plan, pool);
    refine_pool<Weighted>(tile, pool, args.plan->final_passes, args.plan->overshoot);
  } else {
    search<Weighted>(tile, *args.plan, pool);
  }
  Stored stored;
  alignas(64) float low[kLanes], high[kLanes], centre[kLanes], scale[kLanes], zero[kLanes];
  Lanes::store(low, frame.low);
  Lanes::store(high, frame.high);
  Lanes::store(centre, frame.centre);
  for (int lane = 0; lane < kLanes; ++lane)
    minmax_params(low[lane], high[lane], tile.top, args.storage, stored.scale[0][lane], stored.zero[0][lane]);
  stored.count = 1;
  round_candidates<Weighted>(tile, args, frame, pool, stored);
  for (int lane = 0; lane < kLanes; ++lane)
    constant_params(centre[lane], args.storage, stored.scale[stored.count][lane], stored.zero[stored.count][lane]);
  ++stored.count;
  // The weights as they are: what was normalised is read again.
  read_weights(place, scratch.weight);
  choose_stored<Weighted>(tile, args, frame, stored, scale, zero);
  write_codes(tile, place, scratch.block, scale, zero);
  for (int lane = 0; lane < kLanes && place.first + lane < args.groups(); ++lane) {
    store_scalar(args.scale, place.first + lane, args.storage, scale[lane]);
    store_scalar(args.zero, place.first + lane, args.storage, zero[lane]);
  }
  return true;
}

struct QuantizeJob {
  const QuantizeArgs& args;
  std::atomic<int64_t> next{0};
  std::atomic<int> result{kQuantized};
};

void quantize_some(void* data) {
  auto& job = *static_cast<QuantizeJob*>(data);
  Scratch scratch;
  if (!scratch.allocate(job.args)) {
    job.result = kOutOfMemory;
    return;
  }
  const int64_t step = int64_t(kTilesAtOnce) * kLanes, groups = job.args.groups();
  for (int64_t first; (first = job.next.fetch_add(step, std::memory_order_relaxed)) < groups;) {
    for (int64_t start = first; start < first + step && start < groups; start += kLanes) {
      const Place place{job.args, start};
      const bool done = job.args.importance ? quantize_tile<true>(place, scratch) : quantize_tile<false>(place, scratch);
      if (!done) job.result = kUnusableWeight;
    }
  }
}

inline QuantizeResult quantize(const QuantizeArgs& args) {
  QuantizeJob job{args};
  team_run(quantize_some, &job, args.threads);
  return QuantizeResult(job.result.load());
}

}  // namespace
}  // namespace neuqi
