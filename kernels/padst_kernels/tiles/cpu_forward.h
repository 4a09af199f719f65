// Forward pass: a slab of tokens is transposed once, then its rows are read by index into register
// tiles, ROWS rows of y by up to three vectors of tokens.

#pragma once

#include "cpu_units.h"

namespace {

// y[i] = sum over k of weight[k][i] * x[column[k]], for NROWS rows of a row group from `first` on.
template <class Unit, int NROWS, int NV>
inline void forward_rows(const Index& index, int64_t group, int64_t first,
                         const typename Unit::word* x, const typename Unit::word* weight,
                         typename Unit::word* y) {
  const int64_t height = index.height, depth = (index.width + Unit::PER - 1) / Unit::PER;
  vec sum[NROWS][NV] = {};
  for (int64_t n = index.begin(group); n < index.end(group); ++n) {
    const auto* w = weight + index.tile(n) * depth * height + first;
    const int32_t* column = index.columns + n * index.width;
    for (int64_t k = 0; k < depth; ++k, w += height) {
      const auto* row = x;
      if constexpr (Unit::PER == 1)
        row += column[k] * (NV * LANES);
      else  // gathered before
        x += NV * LANES;
      vec in[NV];
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) in[v] = load_words(row + v * LANES);
      accumulate<Unit>(sum, in, w, 1);
    }
  }
  Unit::put(index, group * height + first, (group + 1) * height, sum, y);
}

template <class Unit, typename T>
void forward(const Index& index, const T* x, const T* weight, int64_t num_tokens, T* y) {
  const auto* words = Unit::column_words(index, weight);
  const int64_t height = index.height;
  in_slabs(index, num_tokens, [&](int64_t start, int64_t count, auto vectors) {
    constexpr int NV = decltype(vectors)::value;
    constexpr int64_t stride = NV * LANES;
    auto* in = buffer<Unit>(INPUT, Unit::x_words(index) * stride);
    auto* out = buffer<Unit>(OUTPUT, Unit::y_words(index) * stride);
    Unit::read_x(index, x + start * index.in_features, count, stride, in);
    for (int64_t r = 0; r < index.num_groups; ++r) {
      const auto* rows = Unit::template x_of_group<NV>(index, r, in);
      const auto run = [&](int64_t i, auto tile) {
        forward_rows<Unit, decltype(tile)::value, NV>(index, r, i, rows, words, out);
      };
      constexpr int MOST = NV == 1 ? 2 * ROWS : ROWS;
      int64_t i = 0;
      for (; i + MOST <= height; i += MOST) run(i, std::integral_constant<int, MOST>());
      for (; i + 4 <= height; i += 4) run(i, std::integral_constant<int, 4>());
      // A pair may reach over the row group, into the next word of columns or padding.
      for (; i < height; i += Unit::PER) run(i, std::integral_constant<int, Unit::PER>());
    }
    Unit::write_y(index, out, stride, count, y + start * index.out_features);
  });
}

}  // namespace
