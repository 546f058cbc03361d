#include "gather.h"

#include <algorithm>
#include <atomic>

#include "codes.h"
#include "team.h"

namespace neuqi {
namespace {

// Below this many weights a second thread costs more than it brings.
constexpr int64_t kWeightsPerThread = int64_t(1) << 15;

struct Job {
  const Geometry& geometry;
  const uint8_t* tiles;
  const int64_t* ids;
  int64_t count;
  void* y;
  int y_kind;
  std::atomic<int64_t> next{0};
};

// The type is a constant here, so that the loop is free of branches.
template <int Kind>
void store_block(void* y, int64_t to, const float* values) {
  for (int i = 0; i < kBlock; ++i) store_scalar(y, to + i, Kind, values[i]);
}

template <int B>
void gather_row(const Job& job, int64_t index) {
  const Geometry& geometry = job.geometry;
  const int64_t id = job.ids[index], tile = id / kTile, row = id % kTile;
  const Position position = geometry.position(tile);
  void (*store)(void*, int64_t, const float*) = job.y_kind == kFloat32   ? store_block<kFloat32>
                                                : job.y_kind == kFloat16 ? store_block<kFloat16>
                                                                         : store_block<kBfloat16>;
  int64_t to = index * geometry.k;
  for (int64_t g = 0; g < geometry.groups(); ++g) {
    for (int64_t block = 0; block < geometry.blocks(); ++block, to += kBlock) {
      float values[kBlock];
      dequantize_block<B>(geometry, position, job.tiles, g, block, row, values);
      store(job.y, to, values);
    }
  }
}

template <int B>
void work(void* data) {
  auto& job = *static_cast<Job*>(data);
  for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;) gather_row<B>(job, i);
}

}  // namespace

bool gather(const Geometry& geometry, const uint8_t* tiles, const int64_t* ids, int64_t count, void* y, int y_kind,
            int threads) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= geometry.n) return false;
  Job job{geometry, tiles, ids, count, y, y_kind};
  void (*run)(void*) = geometry.bits == 2   ? work<2>
                       : geometry.bits == 3 ? work<3>
                       : geometry.bits == 4 ? work<4>
                                            : work<8>;
  const int64_t useful = std::max<int64_t>(1, count * geometry.k / kWeightsPerThread);
  team_run(run, &job, int(std::min<int64_t>({threads, count, useful})));
  return true;
}

}  // namespace neuqi
