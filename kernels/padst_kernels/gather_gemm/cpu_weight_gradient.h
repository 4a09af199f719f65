// Weight gradient: x of a long slab of tokens is transposed, dy stays token-major. Lanes hold rows
// of the tile. Sums over tokens are float32, and are rounded once, after the last slab.

#pragma once

#include "cpu_units.h"

namespace {

// Words of tokens of a slab: the 197 of a ViT fit in one.
constexpr int64_t LONG_SLAB = 13 * LANES;

// Where sums over a slab go: to `total`, or from there rounded to `dw`.
template <typename T>
struct Sums {
  float* total;
  T* dw;
  int64_t stride;
  bool first, last;

  void add(int64_t column, int64_t row, vec sum, int64_t n) const {
    const int64_t i = column * stride + row;
    if (!first) sum += load(total + i, n);
    if (last)
      store(dw + i, sum, n);
    else
      store(total + i, sum, n);
  }
};

// The sums over tokens of x[column[i]][t] * dy[t][0 .. NV * LANES], for NCOLUMNS columns from
// `first` on; only the rows from `row` up to `num_rows` exist.
template <class Unit, int NCOLUMNS, int NV, typename T>
inline void dw_columns(const typename Unit::word* x, int64_t x_stride, const int32_t* column,
                       const typename Unit::word* dy, int64_t dy_stride, int64_t num_words,
                       const Sums<T>& sums, int64_t first, int64_t row, int64_t num_rows) {
  vec sum[NCOLUMNS][NV] = {};
  const typename Unit::word* in[NCOLUMNS];
  for (int i = 0; i < NCOLUMNS; ++i) in[i] = x + column[first + i] * x_stride;
  for (int64_t t = 0; t < num_words; ++t, dy += dy_stride) {
    vec rows[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) rows[v] = *reinterpret_cast<const vec*>(dy + v * LANES);
#pragma GCC unroll 24
    for (int i = 0; i < NCOLUMNS; ++i) {
      const vec coefficient = Unit::broadcast(in[i][t]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        sum[i][v] = Unit::multiply_add(coefficient, rows[v], sum[i][v]);
    }
  }
  for (int i = 0; i < NCOLUMNS; ++i)
    for (int v = 0; v < NV; ++v) {
      const int64_t r = row + v * LANES;
      if (r < num_rows) sums.add(first + i, r, sum[i][v], std::min<int64_t>(LANES, num_rows - r));
    }
}

template <class Unit, int NV, typename T>
void dw_rows(const typename Unit::word* x, int64_t x_stride, const int32_t* column, int64_t width,
             const typename Unit::word* dy, int64_t dy_stride, int64_t num_words,
             const Sums<T>& sums, int64_t row, int64_t num_rows) {
  constexpr int COLUMNS = (LANES == 8 ? 12 : 24) / NV;
  const auto run = [&](int64_t k, auto columns) {
    dw_columns<Unit, decltype(columns)::value, NV>(x, x_stride, column, dy, dy_stride, num_words,
                                                   sums, k, row, num_rows);
  };
  int64_t k = 0;
  for (; k + COLUMNS <= width; k += COLUMNS) run(k, std::integral_constant<int, COLUMNS>());
  for (; k + 4 <= width; k += 4) run(k, std::integral_constant<int, 4>());
  for (; k < width; ++k) run(k, std::integral_constant<int, 1>());
}

// Word i of dy, its rows in the order of the row groups.
template <class Unit, typename T>
void copy_rows(const Index& index, const T* dy, int64_t i, int64_t count,
               typename Unit::word* out) {
  const int64_t size = index.out_features;
  if (size < index.num_rows()) std::memset(out, 0, index.num_rows() * sizeof(*out));
  for (int64_t o = 0; o < size; o += LANES) {
    const int64_t n = std::min<int64_t>(LANES, size - o);
    const vec words = Unit::load_tokens(dy + o, size, i, count, n);
    if (!index.positions()) {
      store(reinterpret_cast<float*>(out + o), words, n);
      continue;
    }
    typename Unit::word part[LANES];
    std::memcpy(part, &words, sizeof(part));
    for (int64_t j = 0; j < n; ++j) out[index.positions()[o + j]] = part[j];
  }
}

template <class Unit, typename T>
void weight_gradient(const Index& index, const T* x, const T* dy, int64_t num_tokens, T* dw) {
  typedef typename Unit::word word;
  const int64_t in_features = index.in_features, out_features = index.out_features;
  const int64_t width = index.width, height = index.height, num_rows = index.num_rows();
  // Slabs of equal length, of whole vectors.
  const int64_t num_words = (num_tokens + Unit::PER - 1) / Unit::PER;
  const int64_t num_slabs = std::max<int64_t>(1, (num_words + LONG_SLAB - 1) / LONG_SLAB);
  const int64_t stride = (num_words + num_slabs * LANES - 1) / (num_slabs * LANES) * LANES;
  // Lanes read past the last row of a tile that is no multiple of them.
  const bool direct = std::is_same_v<T, float> && !index.positions() && num_rows == out_features &&
                      height % LANES == 0;
  word* slab = buffer<Unit>(INPUT, (in_features + 1) * stride);
  word* dy_rows = buffer<Unit>(OUTPUT, direct ? 0 : stride * num_rows + 4 * LANES);
  float* total = nullptr;
  if constexpr (std::is_same_v<T, float>)
    total = dw;
  else if (num_slabs > 1)
    total = scratch(EXTRA, index.num_tiles * width * height);
  for (int64_t s = 0; s < num_slabs; ++s) {
    const int64_t start = s * stride * Unit::PER;
    const int64_t count = std::clamp<int64_t>(num_tokens - start, 0, stride * Unit::PER);
    const int64_t words = (count + Unit::PER - 1) / Unit::PER;
    const T *x_part = x + start * in_features, *dy_part = dy + start * out_features;
#pragma omp parallel if (index.threads_pay(count))
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < stride; i += LANES) {
        for (int64_t j = 0; j < in_features; j += LANES)
          transpose(
              LANES, in_features - j,
              [&](int64_t r, int64_t n) {
                return Unit::load_tokens(x_part + j, in_features, i + r, count, n);
              },
              [&](int64_t c, vec v, int64_t) {
                *reinterpret_cast<vec*>(slab + (j + c) * stride + i) = v;
              });
        std::memset(slab + in_features * stride + i, 0, LANES * sizeof(word));
        for (int64_t r = i; r < std::min(words, i + LANES) && !direct; ++r)
          copy_rows<Unit>(index, dy_part, r, count, dy_rows + r * num_rows);
      }
#pragma omp for schedule(dynamic)
      for (int64_t r = 0; r < index.num_groups; ++r)
        for (int64_t n = index.begin(r); n < index.end(r); ++n) {
          const int64_t offset = index.tile(n) * width * height;
          const Sums<T> sums{total ? total + offset : nullptr, dw + offset, height, s == 0,
                             s + 1 == num_slabs};
          const word* in = dy_rows + r * height;
          if constexpr (std::is_same_v<T, float>)
            if (direct) in = dy_part + r * height;
          for (int64_t v = 0; v < height;) {
            const int64_t vectors = std::min<int64_t>(4, (height - v + LANES - 1) / LANES);
            auto run = vectors == 4   ? dw_rows<Unit, 4, T>
                       : vectors == 3 ? dw_rows<Unit, 3, T>
                       : vectors == 2 ? dw_rows<Unit, 2, T>
                                      : dw_rows<Unit, 1, T>;
            run(slab, stride, index.columns + n * width, width, in + v, num_rows, words, sums, v,
                height);
            v += vectors * LANES;
          }
        }
    }
  }
}

}  // namespace
