// What one lane multiplies: a number of float32 (Single), or a pair of bfloat16 numbers where the
// CPU has products of pairs (Pair, cpu_pairs.h). The passes are written for either. Slabs of tokens
// hold words: PER numbers that a sum takes in one step, from neighbouring columns in the forward
// pass, neighbouring rows in dx, neighbouring tokens in dw.

#pragma once

#include <omp.h>

#include <type_traits>

#include "cpu_index.h"

namespace {

constexpr int ROWS = LANES == 8 ? 4 : 8;  // rows of a register tile
constexpr int64_t VECTORS = 3;            // vectors of tokens in a slab, and in a register tile

enum Scratch { INPUT, OUTPUT, EXTRA, WEIGHT };

template <class Unit>
typename Unit::word* buffer(Scratch which, int64_t size) {
  return reinterpret_cast<typename Unit::word*>(scratch(which, size));
}

template <typename Word>
inline vec load_words(const Word* p) {
  return *reinterpret_cast<const vec*>(p);
}
template <typename Word>
inline void store_words(Word* p, vec v) {
  *reinterpret_cast<vec*>(p) = v;
}

// A weight in float32.
inline const float* widened(const float* weight, int64_t) { return weight; }
template <typename T>
const float* widened(const T* weight, int64_t size) {
  float* wide = scratch(WEIGHT, size);
  convert(weight, wide, size);
  return wide;
}

struct Single {
  typedef float word;
  static constexpr int PER = 1;
  static vec broadcast(word w) { return splat(w); }
  static vec multiply_add(vec a, vec b, vec sum) { return sum + a * b; }

  // Weight in words of columns, [G, ceil(K / PER), V], and in words of rows, [G, K, ceil(V / PER)].
  template <typename T>
  static const word* column_words(const Index& index, const T* weight) {
    return widened(weight, index.num_tiles * index.width * index.height);
  }
  template <typename T>
  static const word* row_words(const Index& index, const T* weight) {
    return column_words(index, weight);
  }

  // x of `count` tokens as a slab whose rows are `stride` long, and what it shows a row group.
  static int64_t x_words(const Index& index) { return index.in_features + 1; }
  template <typename T>
  static void read_x(const Index& index, const T* x, int64_t count, int64_t stride, word* slab) {
    const int64_t size = index.in_features;
    to_features(x, size, count, size, stride, nullptr, slab, stride);
    std::memset(slab + size * stride, 0, stride * sizeof(word));
  }
  template <int NV>
  static const word* x_of_group(const Index&, int64_t, const word* slab) {
    return slab;
  }

  // The same for dy.
  static int64_t dy_words(const Index& index) { return index.num_rows(); }
  template <typename T>
  static void read_dy(const Index& index, const T* dy, int64_t count, int64_t stride, word* slab) {
    const int64_t size = index.out_features;
    if (size < index.num_rows())
      std::memset(slab, 0, index.num_rows() * stride * sizeof(word));
    to_features(dy, size, count, size, stride, index.positions(), slab, stride);
  }
  template <int NV>
  static const word* dy_of_group(const Index& index, int64_t group, const word* slab) {
    return slab + group * index.height * NV * LANES;
  }

  // Sums from `row` on, of a row group up to `end`, go to a slab of the features of y, and from
  // there to y; dx adds up in a slab of float32. Rows without a feature share one behind the last.
  static int64_t y_words(const Index& index) { return index.out_features + 1; }
  template <int NROWS, int NV>
  static void put(const Index& index, int64_t row, int64_t, const vec (&sum)[NROWS][NV],
                  word* slab) {
#pragma GCC unroll 16
    for (int i = 0; i < NROWS; ++i) {
      word* out = slab + index.feature(row + i) * (NV * LANES);
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) store(out + v * LANES, sum[i][v]);
    }
  }
  template <typename T>
  static void write_y(const Index& index, const word* slab, int64_t stride, int64_t count, T* y) {
    to_tokens(slab, stride, count, index.out_features, y, index.out_features);
  }
  template <typename T>
  static void write_dx(const Index& index, const float* slab, int64_t stride, int64_t count,
                       T* dx) {
    to_tokens(slab, stride, count, index.in_features, dx, index.in_features);
  }

  // Word `i` of tokens, of n features from `x` on; tokens from `num_tokens` on are zero.
  template <typename T>
  static vec load_tokens(const T* x, int64_t stride, int64_t i, int64_t num_tokens, int64_t n) {
    return i < num_tokens ? load(x + i * stride, n) : vec{};
  }
};

// sum[i] += weight[i * stride] * in, for the rows of a register tile.
template <class Unit, int NROWS, int NV>
[[gnu::always_inline]] inline void accumulate(vec (&sum)[NROWS][NV], const vec (&in)[NV],
                                              const typename Unit::word* weight, int64_t stride) {
#pragma GCC unroll 16
  for (int i = 0; i < NROWS; ++i) {
    const vec coefficient = Unit::broadcast(weight[i * stride]);
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) sum[i][v] = Unit::multiply_add(coefficient, in[v], sum[i][v]);
  }
}

// Calls run(first, size) for tiles that cover `size` things: of MOST each, where that leaves a
// rest some of MOST - 1, since few sums at a time wait for each other.
template <int MOST, typename Run>
[[gnu::always_inline]] inline void in_tiles(int64_t size, Run run) {
  int64_t shorter = (MOST - size % MOST) % MOST;
  if (shorter * (MOST - 1) > size) shorter = 0;
  const int64_t whole = size - shorter * (MOST - 1);
  int64_t i = 0;
  for (; i + MOST <= whole; i += MOST) run(i, std::integral_constant<int, MOST>());
  for (; i + 4 <= whole; i += 4) run(i, std::integral_constant<int, 4>());
  for (; i < whole; ++i) run(i, std::integral_constant<int, 1>());
  for (; i < size; i += MOST - 1) run(i, std::integral_constant<int, MOST - 1>());
}

// Calls run(first token, tokens, vectors) for slabs; several threads share the vectors evenly.
template <typename Run>
void in_slabs(const Index& index, int64_t num_tokens, Run run) {
  const int64_t vectors = (num_tokens + LANES - 1) / LANES;
#pragma omp parallel if (index.threads_pay(num_tokens))
  {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t last = std::min(num_tokens, vectors * (thread + 1) / threads * LANES);
    for (int64_t start = vectors * thread / threads * LANES; start < last;) {
      const int64_t count = std::min(VECTORS * LANES, last - start);
      if (count <= LANES)
        run(start, count, std::integral_constant<int, 1>());
      else if (count <= 2 * LANES)
        run(start, count, std::integral_constant<int, 2>());
      else
        run(start, count, std::integral_constant<int, VECTORS>());
      start += count;
    }
  }
}

}  // namespace
