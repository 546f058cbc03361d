#include "repack.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>

#include "codes.h"
#include "team.h"

namespace neuqi {
namespace {

struct Job {
  const Geometry& geometry;
  const uint32_t* qweight;
  const void *scale, *zero;
  uint8_t* tiles;
  float* weight;
  std::atomic<int64_t> next{0};
};

template <int B>
void repack_tile(const Job& job, int64_t tile) {
  const Geometry& geometry = job.geometry;
  const Position position = geometry.position(tile);
  const int64_t groups = geometry.groups(), blocks = geometry.blocks(), words = geometry.k * B / 32;
  const int bytes = kind_bytes(geometry.scale_kind);
  const int64_t rows = std::min<int64_t>(kTile, geometry.n - tile * kTile);
  for (int64_t g = 0; g < groups; ++g) {
    uint8_t* header = job.tiles + position.header + g * position.group_stride;
    uint8_t* codes = job.tiles + position.codes + g * position.group_stride;
    // Rows beyond N stay zero in all three parts, and so contribute nothing.
    if (rows < kTile) std::memset(header, 0, size_t(geometry.header_bytes()));
    for (int64_t row = 0; row < rows; ++row) {
      int64_t from = ((tile * kTile + row) * groups + g) * bytes;
      std::memcpy(header + row * bytes, static_cast<const char*>(job.scale) + from, size_t(bytes));
      std::memcpy(header + (kTile + row) * bytes, static_cast<const char*>(job.zero) + from, size_t(bytes));
    }
    for (int64_t block = 0; block < blocks; ++block, codes += position.block_stride) {
      for (int r = 0; r < B && rows < kTile; ++r) std::memset(codes + r * position.register_stride, 0, kRegisterBytes);
      for (int64_t row = 0; row < rows; ++row) {
        uint32_t quads[kQuads];
        quads_of_words<B>(job.qweight + (tile * kTile + row) * words + (g * blocks + block) * B, quads);
        pack_lane<B>(quads, codes + 4 * row, position.register_stride);
      }
    }
  }
}

template <int B>
void dequantize_tile(const Job& job, int64_t tile) {
  const Geometry& geometry = job.geometry;
  const Position position = geometry.position(tile);
  const int64_t rows = std::min<int64_t>(kTile, geometry.n - tile * kTile);
  for (int64_t row = 0; row < rows; ++row) {
    float* to = job.weight + (tile * kTile + row) * geometry.k;
    for (int64_t g = 0; g < geometry.groups(); ++g)
      for (int64_t block = 0; block < geometry.blocks(); ++block, to += kBlock)
        dequantize_block<B>(geometry, position, job.tiles, g, block, row, to);
  }
}

template <void (*Tile)(const Job&, int64_t)>
void work(void* data) {
  auto& job = *static_cast<Job*>(data);
  for (int64_t tile; (tile = job.next.fetch_add(1, std::memory_order_relaxed)) < job.geometry.tiles();) Tile(job, tile);
}

// Large pages, where the system gives them on request: a stream of weights then misses the TLB 512 times less often.
void ask_for_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes)) / kPage * kPage;
  // A refusal only means small pages.
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace

void repack(const Geometry& geometry, const uint32_t* qweight, const void* scale, const void* zero, uint8_t* tiles,
            int threads) {
  ask_for_large_pages(tiles, geometry.tiles() * geometry.tile_bytes());
  Job job{geometry, qweight, scale, zero, tiles, nullptr};
  void (*run)(void*) = geometry.bits == 2   ? work<repack_tile<2>>
                       : geometry.bits == 3 ? work<repack_tile<3>>
                       : geometry.bits == 4 ? work<repack_tile<4>>
                                            : work<repack_tile<8>>;
  team_run(run, &job, int(std::min<int64_t>(threads, geometry.tiles())));
}

void dequantize(const Geometry& geometry, const uint8_t* tiles, float* weight, int threads) {
  Job job{geometry, nullptr, nullptr, nullptr, const_cast<uint8_t*>(tiles), weight};
  void (*run)(void*) = geometry.bits == 2   ? work<dequantize_tile<2>>
                       : geometry.bits == 3 ? work<dequantize_tile<3>>
                       : geometry.bits == 4 ? work<dequantize_tile<4>>
                                            : work<dequantize_tile<8>>;
  team_run(run, &job, int(std::min<int64_t>(threads, geometry.tiles())));
}

}  // namespace neuqi
