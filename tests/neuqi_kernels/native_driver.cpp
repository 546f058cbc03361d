// Runs the C++ kernels through their C interface, without Python or torch: under an emulator, under sanitizers.
//
// Every case packs a random layer into buffers of exactly the needed size, multiplies it with every instruction set that
// the library and the CPU share, and compares each result with that of `portable` bit by bit and with float64 within the
// rounding errors that the arithmetic allows. Prints what was compared, and leaves with 1 at the first difference.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "scalar.h"

extern "C" {
int neuqi_cpu_built();
int neuqi_cpu_supported();
int neuqi_cpu_team_is_shared();
int64_t neuqi_cpu_tile_bytes(int64_t k, int bits, int64_t group, int scale_kind);
void neuqi_cpu_repack(const void*, const void*, const void*, void*, int64_t n, int64_t k, int bits, int64_t group,
                      int scale_kind, int threads);
void neuqi_cpu_dequantize(const void* tiles, float* weight, int64_t n, int64_t k, int bits, int64_t group,
                          int scale_kind, int threads);
int neuqi_cpu_gemm(int isa, const void* x, const void* tiles, const void* bias, void* y, int64_t m, int64_t n,
                   int64_t k, int bits, int64_t group, int x_kind, int scale_kind, int bias_kind, int threads);
int neuqi_cpu_experts(int isa, const void* x, const void* first_tiles, const void* first_bias,
                      const void* second_tiles, const void* second_bias, const void* ids, const void* weights, void* y,
                      int64_t tokens, int64_t top_k, int64_t experts, int64_t hidden, int64_t intermediate,
                      int first_bits, int64_t first_group, int second_bits, int64_t second_group, int kind,
                      int scale_kind, int bias_kind, int activation, int threads);
int neuqi_cpu_gather(const void* tiles, const void* ids, void* y, int64_t count, int64_t n, int64_t k, int bits,
                     int64_t group, int scale_kind, int y_kind, int threads);
uint64_t neuqi_cpu_read(const void* data, int64_t bytes, int threads);
}

namespace {

using namespace neuqi;

// In the order of `Isa` in entry.cpp.
const char* const kNames[] = {"portable", "avx2", "avx_vnni", "avx512", "avx512_vnni", "neon"};
constexpr int kIsas = 6;
// Unit roundoff of a dtype, half of its smallest positive number, and half a step of its fixed point as a part of the
// largest activation of a segment; see test_cpu_native.py.
constexpr double kRoundoff[] = {0x1p-24, 0x1p-11, 0x1p-8};
constexpr double kTiny[] = {0x1p-149, 0x1p-25, 0x1p-134};
constexpr double kFixedPoint[] = {0x1p-22, 0x1p-22, 0x1p-15};
constexpr int kStepsPerSegment = 8, kExtraSteps = 16;

[[noreturn]] void fail(const char* what, const char* where) {
  std::fprintf(stderr, "%s: %s\n", where, what);
  std::exit(1);
}

// Xorshift: the same numbers everywhere.
struct Random {
  uint64_t state;
  uint32_t next() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return uint32_t(state >> 32);
  }
  double uniform() { return next() * 0x1p-32; }
  double symmetric() { return uniform() + uniform() + uniform() - 1.5; }
};

// Exactly `bytes` bytes of heap up to its end, `offset` bytes behind an aligned address, filled with NaN.
class Buffer {
 public:
  Buffer(int64_t bytes, int64_t offset, int64_t alignment = 16) : offset_(offset) {
    void* memory = nullptr;
    if (posix_memalign(&memory, size_t(alignment), size_t(offset + bytes))) fail("memory is short", "driver");
    std::memset(memory, 0xFF, size_t(offset + bytes));
    memory_.reset(static_cast<char*>(memory));
  }
  char* data() { return memory_.get() + offset_; }
  const char* data() const { return memory_.get() + offset_; }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t offset_;
};

enum Activity { kUsual, kSubnormal, kOutlier, kZeros, kNotFinite, kActivities };

struct Case {
  int64_t m, n, k, group;
  int bits, x_kind, scale_kind, bias_kind, threads;
  bool has_bias, misaligned, far_zeros;
  Activity activity;
  char name[160];
};

struct Layer {
  const Case& c;
  std::vector<uint8_t> codes;
  Buffer qweight, scale, zero, tiles;

  int64_t groups() const { return c.k / c.group; }
  double code(int64_t row, int64_t i) const { return codes[size_t(row * c.k + i)]; }
  double scale_of(int64_t row, int64_t i) const {
    return load_scalar(scale.data(), row * groups() + i / c.group, c.scale_kind);
  }
  double zero_of(int64_t row, int64_t i) const {
    return load_scalar(zero.data(), row * groups() + i / c.group, c.scale_kind);
  }

  Layer(const Case& c, Random& random)
      : c(c),
        codes(size_t(c.n * c.k)),
        qweight(c.n * c.k / 32 * c.bits * 4, 0),
        scale(c.n * groups() * kind_bytes(c.scale_kind), 0),
        zero(c.n * groups() * kind_bytes(c.scale_kind), 0),
        tiles((c.n + kTile - 1) / kTile * neuqi_cpu_tile_bytes(c.k, c.bits, c.group, c.scale_kind), 0, 64) {
    std::memset(qweight.data(), 0, size_t(c.n * c.k / 32 * c.bits * 4));
    auto* words = reinterpret_cast<uint32_t*>(qweight.data());
    for (int64_t i = 0; i < c.n * c.k; ++i) {
      codes[size_t(i)] = uint8_t(random.next() >> (32 - c.bits));
      // The bit streams of all rows, one after the other, as a row has whole words.
      for (int bit = 0; bit < c.bits; ++bit)
        if (codes[size_t(i)] >> bit & 1) words[(i * c.bits + bit) / 32] |= 1u << (i * c.bits + bit) % 32;
    }
    for (int64_t i = 0; i < c.n * groups(); ++i) {
      const double sign = random.next() % 8 ? 1 : -1, at = random.uniform() * (1 << c.bits) - 0.5;
      store_scalar(scale.data(), i, c.scale_kind, float(sign * (random.uniform() * 0.1 + 0.01)));
      store_scalar(zero.data(), i, c.scale_kind, float(c.far_zeros ? (random.next() & 1 ? 60000 : -12345.5) : at));
    }
    neuqi_cpu_repack(qweight.data(), scale.data(), zero.data(), tiles.data(), c.n, c.k, c.bits, c.group, c.scale_kind,
                     c.threads);
  }

  void check_dequantized() {
    Buffer weight(c.n * c.k * 4, c.misaligned ? 4 : 0);
    neuqi_cpu_dequantize(tiles.data(), reinterpret_cast<float*>(weight.data()), c.n, c.k, c.bits, c.group, c.scale_kind,
                         c.threads);
    for (int64_t i = 0; i < c.n * c.k; ++i) {
      if (load_scalar(weight.data(), i, kFloat32) != weight_of(i / c.k, i % c.k))
        fail("dequantize differs from its definition", c.name);
    }
  }

  float weight_of(int64_t row, int64_t i) const {
    return (float(code(row, i)) - float(zero_of(row, i))) * float(scale_of(row, i));
  }

  int gather(const std::vector<int64_t>& ids, Buffer& y) {
    return neuqi_cpu_gather(tiles.data(), ids.data(), y.data(), int64_t(ids.size()), c.n, c.k, c.bits, c.group,
                            c.scale_kind, c.x_kind, c.threads);
  }

  void check_gathered() {
    const int bytes = kind_bytes(c.x_kind);
    const std::vector<int64_t> ids{c.n - 1, 0, c.n / 2};
    Buffer rows(3 * c.k * bytes, c.misaligned ? bytes : 0), expected(bytes, 0);
    if (gather(ids, rows)) fail("gather refuses rows that are there", c.name);
    for (int64_t i = 0; i < 3 * c.k; ++i) {
      store_scalar(expected.data(), 0, c.x_kind, weight_of(ids[size_t(i / c.k)], i % c.k));
      if (std::memcmp(rows.data() + i * bytes, expected.data(), size_t(bytes)))
        fail("gather differs from its definition", c.name);
    }
    for (int64_t id : {c.n, int64_t(-1)})
      if (!gather({0, id, 0}, rows)) fail("gather takes a row that is not there", c.name);
  }
};

Buffer activations(const Case& c, Random& random) {
  const int bytes = kind_bytes(c.x_kind);
  Buffer x(c.m * c.k * bytes, c.misaligned ? bytes : 0);
  for (int64_t i = 0; i < c.m * c.k; ++i) {
    double value = random.symmetric();
    if (c.activity == kSubnormal) value *= c.x_kind == kFloat16 ? 0x1p-20 : 0x1p-140;
    if (c.activity == kOutlier && i % 61 == 7) value *= 10000;
    if (c.activity == kZeros) value = 0;
    store_scalar(x.data(), i, c.x_kind, float(value));
  }
  // The last of the first token, the first of the last: at both ends of the buffer where there is one token only.
  if (c.activity == kNotFinite) {
    store_scalar(x.data(), c.k - 1, c.x_kind, INFINITY);
    store_scalar(x.data(), (c.m - 1) * c.k, c.x_kind, NAN);
  }
  return x;
}

// Largest activations of the segments of one token, and whether all are finite.
bool largest_of(const Case& c, const Buffer& x, int64_t token, int64_t segment, std::vector<double>& largest) {
  bool finite = true;
  for (int64_t i = 0; i < c.k; ++i) {
    const double value = std::fabs(load_scalar(x.data(), token * c.k + i, c.x_kind));
    finite &= std::isfinite(value);
    double& most = largest[size_t(i / segment)];
    most = i % segment ? std::fmax(most, value) : value;
  }
  return finite;
}

void check_against_float64(const Case& c, const Layer& layer, const Buffer& x, const Buffer& bias, const Buffer& y) {
  const int64_t segment = Geometry{c.n, c.k, c.group, c.bits, c.scale_kind}.segment(), segments = c.k / segment;
  const auto elements = size_t(c.n * c.k);
  std::vector<double> largest(static_cast<size_t>(segments)), weight(elements), size(elements);
  for (int64_t i = 0; i < c.n * c.k; ++i) {
    const double scale = layer.scale_of(i / c.k, i % c.k), zero = layer.zero_of(i / c.k, i % c.k);
    weight[size_t(i)] = (layer.codes[size_t(i)] - zero) * scale;
    size[size_t(i)] = (layer.codes[size_t(i)] + std::fabs(zero)) * std::fabs(scale);
  }
  for (int64_t token = 0; token < c.m; ++token) {
    const bool finite = largest_of(c, x, token, segment, largest);
    std::vector<double> values(static_cast<size_t>(c.k));
    for (int64_t i = 0; i < c.k; ++i) values[size_t(i)] = load_scalar(x.data(), token * c.k + i, c.x_kind);
    for (int64_t row = 0; row < c.n; ++row) {
      const double got = load_scalar(y.data(), token * c.n + row, c.x_kind);
      if (!finite) {
        if (std::isfinite(got)) fail("a finite result of activations that are not", c.name);
        continue;
      }
      double expected = c.has_bias ? load_scalar(bias.data(), row, c.bias_kind) : 0.0;
      double magnitude = std::fabs(expected), fixed = 0;
      for (int64_t i = 0; i < c.k; ++i) {
        const double w = weight[size_t(row * c.k + i)], v = values[size_t(i)];
        expected += w * v;
        magnitude += size[size_t(row * c.k + i)] * std::fabs(v);
        fixed += std::fabs(w) * largest[size_t(i / segment)];
      }
      const double bound = kRoundoff[c.x_kind] * std::fabs(expected) + kFixedPoint[c.x_kind] * fixed +
                           double(kStepsPerSegment * segments + kExtraSteps) * 0x1p-24 * magnitude +
                           double(segments) * 0x1p-149 + kTiny[c.x_kind];
      const bool overflows = c.x_kind == kFloat16 && std::fabs(expected) + bound >= 65504;
      if (!overflows && !(std::fabs(got - expected) <= bound)) {
        std::fprintf(stderr, "token %d, row %d: %.9g instead of %.9g ± %.3g\n", int(token), int(row), got, expected,
                     bound);
        fail("portable differs from float64", c.name);
      }
    }
  }
}

// Bit by bit; what is no number may be any.
bool same(const Case& c, const Buffer& a, const Buffer& b) {
  for (int64_t i = 0; i < c.m * c.n; ++i) {
    const float left = load_scalar(a.data(), i, c.x_kind), right = load_scalar(b.data(), i, c.x_kind);
    if (to_bits(left) != to_bits(right) && !(std::isnan(left) && std::isnan(right))) return false;
  }
  return true;
}

void run_case(const Case& c, int usable, Random& random, int64_t (&counts)[kIsas]) {
  Layer layer(c, random);
  layer.check_dequantized();
  layer.check_gathered();
  const Buffer x = activations(c, random);
  const int bias_bytes = kind_bytes(c.bias_kind), bytes = kind_bytes(c.x_kind);
  Buffer bias(c.n * bias_bytes, c.misaligned ? bias_bytes : 0);
  for (int64_t i = 0; i < c.n; ++i) store_scalar(bias.data(), i, c.bias_kind, float(random.symmetric()));
  const auto multiply = [&](int isa, int threads) {
    Buffer y(c.m * c.n * bytes, c.misaligned ? bytes : 0);
    if (neuqi_cpu_gemm(isa, x.data(), layer.tiles.data(), c.has_bias ? bias.data() : nullptr, y.data(), c.m, c.n, c.k,
                       c.bits, c.group, c.x_kind, c.scale_kind, c.bias_kind, threads))
      fail("memory is short", c.name);
    return y;
  };
  const Buffer expected = multiply(0, 1);
  check_against_float64(c, layer, x, bias, expected);
  for (int isa = 0; isa < kIsas; ++isa) {
    if (!(usable >> isa & 1)) continue;
    if (!same(c, multiply(isa, c.threads), expected)) fail("differs from portable on one thread", kNames[isa]);
    ++counts[isa];
  }
}

// Tiles of `experts` random layers, one after the other, in a buffer of exactly their size.
Buffer random_experts(int64_t experts, int64_t n, int64_t k, int bits, int64_t group, Random& random) {
  const int64_t bytes = (n + 15) / 16 * neuqi_cpu_tile_bytes(k, bits, group, kFloat32), words = k * bits / 32;
  Buffer tiles(experts * bytes, 0, 64);
  for (int64_t e = 0; e < experts; ++e) {
    std::vector<uint32_t> qweight(static_cast<size_t>(n * words));
    for (uint32_t& word : qweight) word = random.next();
    std::vector<float> scale(static_cast<size_t>(n * (k / group))), zero(scale.size());
    for (float& value : scale) value = float(random.uniform() / (1 << bits));
    for (float& value : zero) value = float(random.uniform() * (1 << bits));
    neuqi_cpu_repack(qweight.data(), scale.data(), zero.data(), tiles.data() + e * bytes, n, k, bits, group, kFloat32, 1);
  }
  return tiles;
}

// Experts with and without routes, and routes of other ranks: every instruction set gives the bits of `portable`.
void run_experts(int bits, int kind, int64_t tokens, int usable, Random& random) {
  constexpr int64_t kExperts = 5, kTopK = 3, kHidden = 64, kIntermediate = 96, kGroup = 32;
  const Buffer first = random_experts(kExperts, 2 * kIntermediate, kHidden, bits, kGroup, random);
  const Buffer second = random_experts(kExperts, kHidden, kIntermediate, bits, kGroup, random);
  const int bytes = kind_bytes(kind), activation = int(random.next() % kActivationCount);
  Buffer x(tokens * kHidden * bytes, bytes);
  for (int64_t i = 0; i < tokens * kHidden; ++i) store_scalar(x.data(), i, kind, float(random.symmetric()));
  std::vector<int32_t> ids(static_cast<size_t>(tokens * kTopK));
  for (int32_t& id : ids) id = int32_t(random.next() % kExperts) - 1;
  std::vector<float> weights(ids.size());
  for (float& weight : weights) weight = float(random.uniform());
  const auto run = [&](int isa, int threads) {
    Buffer y(tokens * kHidden * bytes, bytes);
    if (neuqi_cpu_experts(isa, x.data(), first.data(), nullptr, second.data(), nullptr, ids.data(), weights.data(),
                          y.data(), tokens, kTopK, kExperts, kHidden, kIntermediate, bits, kGroup, bits, kGroup, kind,
                          kFloat32, 0, activation, threads))
      fail("memory is short", "experts");
    return y;
  };
  const Buffer expected = run(0, 1);
  for (int64_t i = 0; i < tokens * kHidden; ++i)
    if (!std::isfinite(load_scalar(expected.data(), i, kind))) fail("a result that is not finite", "experts");
  for (int isa = 0; isa < kIsas; ++isa)
    if (usable >> isa & 1 && std::memcmp(run(isa, 3).data(), expected.data(), size_t(tokens * kHidden * bytes)))
      fail("experts differ from portable on one thread", kNames[isa]);
}

// Everything that is not enumerated is drawn.
Case draw(int bits, int64_t group, int64_t k, int x_kind, int64_t m, Random& random) {
  constexpr int64_t kRows[] = {1, 17, 35, 51, 67};
  Case c{};
  c.m = m, c.k = k, c.group = group, c.bits = bits, c.x_kind = x_kind;
  c.n = kRows[random.next() % 5];
  c.scale_kind = int(random.next() % 3);
  c.bias_kind = int(random.next() % 3);
  c.threads = 1 + int(random.next() % 8);
  c.has_bias = random.next() % 4, c.misaligned = random.next() % 4, c.far_zeros = random.next() % 8 == 0;
  c.activity = random.next() % 2 ? kUsual : Activity(random.next() % kActivities);
  std::snprintf(c.name, sizeof c.name,
                "m=%d n=%d k=%d bits=%d group=%d x=%d scale=%d bias=%d(%d) threads=%d misaligned=%d far=%d activity=%d",
                int(m), int(c.n), int(k), bits, int(group), x_kind, c.scale_kind, c.bias_kind, c.has_bias, c.threads,
                c.misaligned, c.far_zeros, c.activity);
  return c;
}

}  // namespace

// One argument: every which case is run, 1 for all.
int main(int count, char** arguments) {
  const int stride = count > 1 ? std::atoi(arguments[1]) : 1;
  constexpr int kBits[] = {2, 3, 4, 8};
  constexpr int64_t kGroups[][2] = {{32, 160}, {64, 192}, {96, 288}, {128, 384}, {160, 160}, {256, 256}};
  constexpr int64_t kTokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 70};
  const int usable = neuqi_cpu_built() & neuqi_cpu_supported();
  Random random{88172645463325252u};
  int64_t counts[kIsas] = {}, index = 0;
  for (int bits : kBits)
    for (const auto& group : kGroups)
      for (int x_kind = 0; x_kind < 3; ++x_kind)
        for (int64_t m : kTokens) {
          const Case c = draw(bits, group[0], group[1], x_kind, m, random);
          if (index++ % stride == 0) run_case(c, usable, random, counts);
        }
  for (int bits : kBits)
    for (int kind = 0; kind < 3; ++kind)
      for (int64_t tokens : {1, 4, 19}) run_experts(bits, kind, tokens, usable, random);
  Buffer megabyte(1 << 20, 0, 64);
  if (neuqi_cpu_read(megabyte.data(), 1 << 20, 3) != uint64_t(0) - (1 << 17)) fail("a wrong sum", "read");
  for (int isa = 0; isa < kIsas; ++isa)
    if (counts[isa]) std::printf("%s %d\n", kNames[isa], int(counts[isa]));
  std::printf("shared team %d\n", neuqi_cpu_team_is_shared());
  return 0;
}
