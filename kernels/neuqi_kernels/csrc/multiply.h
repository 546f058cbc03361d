// The product of packed codes and fixed-point activations, for any vector unit.
//
// `O` has the operations of one: vectors of O::kLanes lanes, a lane per output row. A byte of codes (0 to 255) times a
// byte of digits (-128 to 127), four to a lane, is one step of `dot`; sums are whole numbers and therefore exact in any
// order. For each segment of input features
//
//     y += (scale · (Σ q·v − zero · Σ v)) · 2^-e
//
// is computed in float32, in this order on every CPU: all vector units give the same bits.
#pragma once

#include <utility>

#include "activations.h"
#include "layout.h"

namespace neuqi {
namespace {

#define NEUQI_INLINE inline __attribute__((always_inline))

// Calls `f(0) … f(N−1)` with constant indices, so that arrays of vectors become registers before any other optimization:
// a loop that the compiler unrolls later leaves them in memory.
template <int... I, class F>
NEUQI_INLINE void call_each(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
NEUQI_INLINE void unrolled(F&& f) {
  call_each(std::make_integer_sequence<int, N>{}, f);
}
#define NEUQI_EACH(i) [&](auto i) __attribute__((always_inline))

// Where the digits of one segment lie: `xs[(quad·P + part)·rows + row]`, and per row its step and sum.
struct Activations {
  const int32_t* xs;
  const float *steps, *sums;
};

// `T` vectors of codes of the same input features.
template <class O, int T>
struct Vectors {
  typename O::Codes of[T];
};

template <class O, int T>
NEUQI_INLINE Vectors<O, T> load_codes(const uint8_t* from) {
  Vectors<O, T> raw;
  unrolled<T>(NEUQI_EACH(t) { raw.of[t] = O::load(from + t * 4 * O::kLanes); });
  return raw;
}

template <int S, class O, int T>
NEUQI_INLINE Vectors<O, T> field(const Vectors<O, T>& raw, int mask) {
  Vectors<O, T> codes;
  unrolled<T>(NEUQI_EACH(t) { codes.of[t] = O::mask(O::template shift_right<S>(raw.of[t]), mask); });
  return codes;
}

template <class O, int T>
NEUQI_INLINE Vectors<O, T> joined(const Vectors<O, T>& a, const Vectors<O, T>& b) {
  Vectors<O, T> both;
  unrolled<T>(NEUQI_EACH(t) { both.of[t] = O::either(a.of[t], b.of[t]); });
  return both;
}

// Hands the codes of a block of 32 input features to `take(quad, codes)`, quad by quad; see Layout for where they are.
template <int B, class O, int T, class Take>
NEUQI_INLINE void unpack_block(const uint8_t* codes, int64_t register_stride, Take&& take) {
  const auto raw = [&](int r) __attribute__((always_inline)) {
    return load_codes<O, T>(codes + r * register_stride);
  };
  if constexpr (B == 2) {
    unrolled<2>(NEUQI_EACH(r) {
      const Vectors<O, T> four = raw(r);
      take(4 * r, field<0>(four, 0x03));
      take(4 * r + 1, field<2>(four, 0x03));
      take(4 * r + 2, field<4>(four, 0x03));
      take(4 * r + 3, field<6>(four, 0x03));
    });
  } else if constexpr (B == 3) {
    const Vectors<O, T> a = raw(0);
    take(0, field<0>(a, 0x07));
    take(1, field<3>(a, 0x07));
    const Vectors<O, T> b = raw(1);
    take(2, field<0>(b, 0x07));
    take(3, field<3>(b, 0x07));
    const Vectors<O, T> c = raw(2);
    take(4, field<0>(c, 0x07));
    take(5, field<3>(c, 0x07));
    take(6, joined(field<5>(a, 0x06), field<6>(c, 0x01)));
    take(7, joined(field<5>(b, 0x06), field<7>(c, 0x01)));
  } else if constexpr (B == 4) {
    unrolled<4>(NEUQI_EACH(r) {
      const Vectors<O, T> two = raw(r);
      take(2 * r, field<0>(two, 0x0F));
      take(2 * r + 1, field<4>(two, 0x0F));
    });
  } else {
    unrolled<8>(NEUQI_EACH(r) { take(r, raw(r)); });
  }
}

template <class O, int P, int R, int T>
struct Sums {
  typename O::Sums of[T * R * P];

  NEUQI_INLINE Sums() {
    unrolled<T * R * P>(NEUQI_EACH(i) { of[i] = O::no_sums(); });
  }

  // `xs`: the digits of one quad. `W`: whether the codes have more than four bits.
  template <bool W>
  NEUQI_INLINE void add(const Vectors<O, T>& codes, const int32_t* xs) {
    unrolled<P * R>(NEUQI_EACH(i) {
      const typename O::Digits x = O::broadcast(xs + i);
      unrolled<T>(NEUQI_EACH(t) {
        constexpr int at = t * P * R + i;
        of[at] = O::template dot<W>(of[at], codes.of[t], x);
      });
    });
  }
};

// Σ q·v of T vectors and R rows, rounded to float32 once (two parts) or twice.
template <class O, int R, int T>
struct Totals {
  typename O::Floats of[T * R];
};

// Adds the segment's contribution to `y [vector][row of all rows][lane]`; `header`: that of the first vector's tile,
// `part`: which vector of its tile it is.
template <class O, int R, int T>
NEUQI_INLINE void finish(const Totals<O, R, T>& totals, const uint8_t* header, int part, int kind,
                         const Activations& x, int64_t rows, float* y) {
  constexpr int kVectors = kTile / O::kLanes;
  // As `y` could alias the pointers in `x`.
  const float *steps = x.steps, *x_sums = x.sums;
  unrolled<T>(NEUQI_EACH(t) {
    const uint8_t* tile = header + int64_t((part + t) / kVectors) * 2 * kTile * kind_bytes(kind);
    const int lane = (part + t) % kVectors * O::kLanes;
    const typename O::Floats scale = O::load_floats(tile, lane, kind);
    const typename O::Floats zero = O::load_floats(tile, kTile + lane, kind);
    unrolled<R>(NEUQI_EACH(r) {
      float* to = y + (t * rows + r) * O::kLanes;
      const typename O::Floats centred = O::subtract_product(totals.of[t * R + r], zero, O::all(x_sums[r]));
      O::store(to, O::multiply_add(O::multiply(scale, centred), O::all(steps[r]), O::load(to)));
    });
  });
}

// Packed codes of one segment, T vectors and R rows. `codes`: of the first vector; `y`: of the first vector and row.
template <class O, int B, int P, int R, int T>
void multiply(const Position& position, const uint8_t* codes, int64_t blocks, const uint8_t* header, int part,
                     int kind, const Activations& x, int64_t rows, float* y) {
  Sums<O, P, R, T> sums;
  const int32_t* xs = x.xs;
  // Lines that begin with these vectors.
  constexpr int kLines = (T * O::kLanes + kTile - 1) / kTile;
  unrolled<kLines>(NEUQI_EACH(t) {
    __builtin_prefetch(header + ((part + t) * O::kLanes / kTile * 2 * kTile) * kind_bytes(kind) + position.ahead);
  });
  for (int64_t block = 0; block < blocks; ++block) {
    unrolled<B>(NEUQI_EACH(r) {
      unrolled<kLines>(NEUQI_EACH(t) {
        __builtin_prefetch(codes + r * position.register_stride + t * kRegisterBytes + position.ahead);
      });
    });
    const auto take = [&](int quad, const Vectors<O, T>& values) __attribute__((always_inline)) {
      sums.template add<(B > 4)>(values, xs + quad * P * R);
    };
    unpack_block<B, O, T>(codes, position.register_stride, take);
    codes += position.block_stride;
    xs += kQuads * P * R;
  }
  Totals<O, R, T> totals;
  unrolled<T * R>(NEUQI_EACH(i) {
    // Otherwise GCC spills the sums, and stores every one of them in every round of the loop.
    constexpr int at = i / R * P * R + i % R;
    unrolled<P>(NEUQI_EACH(p) { O::keep_in_register(sums.of[at + p * R]); });
    const typename O::Sums low = O::add(O::shift_left_8(sums.of[at + (P - 2) * R]), sums.of[at + (P - 1) * R]);
    totals.of[i] = P == 2 ? O::to_floats(low)
                          : O::multiply_add(O::to_floats(sums.of[at]), O::all(65536.0f), O::to_floats(low));
  });
  finish<O, R, T>(totals, header, part, kind, x, rows, y);
}

}  // namespace
}  // namespace neuqi
