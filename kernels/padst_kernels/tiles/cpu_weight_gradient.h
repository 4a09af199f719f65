// Weight gradient: lanes hold rows of a tile. Of a long slab of tokens x is transposed, dy split
// into vectors of rows. Sums over tokens are float32, and are rounded once, after the last slab.

#pragma once

#include "cpu_units.h"

namespace {

// Words of tokens of a slab: the 197 of a ViT fit in one.
constexpr int64_t LONG_SLAB = 13 * LANES;

// out[i] = sum over words of tokens of x[column[i]][t] * dy[0 .. NV][t], for NCOLUMNS columns; each
// dy[v][t] is a vector of rows.
template <class Unit, int NCOLUMNS, int NV>
void dw_columns(const typename Unit::word* x, int64_t stride, const int32_t* column,
                const typename Unit::word* dy, int64_t num_words, float* out) {
  vec sum[NCOLUMNS][NV] = {};
  const typename Unit::word* in[NCOLUMNS];
  for (int i = 0; i < NCOLUMNS; ++i) in[i] = x + column[i] * stride;
  for (int64_t t = 0; t < num_words; ++t, dy += LANES) {
    vec rows[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) rows[v] = load_words(dy + v * stride * LANES);
#pragma GCC unroll 24
    for (int i = 0; i < NCOLUMNS; ++i) {
      const vec coefficient = Unit::broadcast(in[i][t]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        sum[i][v] = Unit::multiply_add(coefficient, rows[v], sum[i][v]);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < NCOLUMNS; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(out + (i * NV + v) * LANES, sum[i][v]);
}

// Where sums over a slab go: to `total`, after the last slab rounded to `dw`.
template <typename T>
struct Sums {
  float* total;
  T* dw;
  bool first, last;

  void add(int64_t i, vec sum, int64_t n) const {
    if (!first) sum += load(total + i, n);
    if (last)
      store(dw + i, sum, n);
    else
      store(total + i, sum, n);
  }
};

// NV vectors of rows of one tile, from `row` on.
template <class Unit, int NV, typename T>
void dw_rows(const Index& index, const int32_t* column, const typename Unit::word* x,
             int64_t stride, const typename Unit::word* dy, int64_t num_words, const Sums<T>& sums,
             int64_t row) {
  constexpr int COLUMNS = (LANES == 8 || NV == 1 ? 12 : 24) / NV;
  const int64_t height = index.height;
  in_tiles<COLUMNS>(index.width, [&](int64_t k, auto columns) {
    constexpr int NCOLUMNS = decltype(columns)::value;
    float sum[NCOLUMNS * NV * LANES];
    dw_columns<Unit, NCOLUMNS, NV>(x, stride, column + k, dy, num_words, sum);
    for (int64_t i = 0; i < NCOLUMNS; ++i)
      for (int64_t r = row; r < std::min(height, row + NV * LANES); r += LANES)
        sums.add((k + i) * height + r, load(sum + i * NV * LANES + r - row),
                 std::min<int64_t>(LANES, height - r));
  });
}

// LANES words of tokens from `start` on, transposed to rows of words that are `stride` apart.
template <class Unit, typename T>
void read_features(const T* in, int64_t num_features, int64_t start, int64_t num_tokens,
                   typename Unit::word* out, int64_t stride) {
  for (int64_t j = 0; j < num_features; j += LANES)
    transpose(
        LANES, num_features - j,
        [&](int64_t r, int64_t n) {
          return Unit::load_tokens(in + j, num_features, start + r, num_tokens, n);
        },
        [&](int64_t c, vec v, int64_t) { store_words(out + (j + c) * stride, v); });
  // What padding reads.
  std::memset(out + num_features * stride, 0, LANES * sizeof(typename Unit::word));
}

// The same of dy to vectors of rows, each token-major, that are `stride` vectors apart. `features`
// are those of the rows, none where they are in natural order.
template <class Unit, typename T>
void read_rows(const T* dy, int64_t out_features, int64_t start, int64_t num_tokens,
               const std::vector<int32_t>& features, typename Unit::word* out, int64_t stride) {
  if (features.empty()) {
    for (int64_t t = 0; t < LANES; ++t)
      for (int64_t o = 0; o < out_features; o += LANES)
        store_words(out + o * stride + t * LANES,
                    Unit::load_tokens(dy + o, out_features, start + t, num_tokens,
                                      std::min<int64_t>(LANES, out_features - o)));
    return;
  }
  // There and back: single words would take several times as long as these transpositions.
  auto* line = buffer<Unit>(WEIGHT, (out_features + 1) * LANES);
  read_features<Unit>(dy, out_features, start, num_tokens, line, LANES);
  const auto size = static_cast<int64_t>(features.size());
  for (int64_t r = 0; r < size; r += LANES)
    transpose(
        LANES, LANES,
        [&](int64_t i, int64_t) { return load_words(line + features[r + i] * LANES); },
        [&](int64_t t, vec rows, int64_t) { store_words(out + r * stride + t * LANES, rows); });
}

template <class Unit, typename T>
void weight_gradient(const Index& index, const T* x, const T* dy, int64_t num_tokens, T* dw) {
  typedef typename Unit::word word;
  const int64_t in_features = index.in_features, out_features = index.out_features;
  const int64_t width = index.width, height = index.height;
  // Slabs of equal length, of whole vectors.
  const int64_t num_words = (num_tokens + Unit::PER - 1) / Unit::PER;
  const int64_t num_slabs = std::max<int64_t>(1, (num_words + LONG_SLAB - 1) / LONG_SLAB);
  const int64_t stride = (num_words + num_slabs * LANES - 1) / (num_slabs * LANES) * LANES;

  // x is feature-major; dy is in vectors of rows, each of them token-major: [R * V / LANES, T].
  const int64_t vectors = (height + LANES - 1) / LANES;
  word* x_slab = buffer<Unit>(INPUT, (in_features + 1) * stride);
  word* dy_slab = buffer<Unit>(OUTPUT, index.num_groups * vectors * LANES * stride);
  // Feature of each row of the slab, O where none is, unless rows are features.
  std::vector<int32_t> features;
  if (index.rows || height % LANES || out_features < index.num_rows()) {
    features.assign(index.num_groups * vectors * LANES, out_features);
    for (int64_t r = 0; r < index.num_groups; ++r)
      for (int64_t v = 0; v < height; ++v)
        features[r * vectors * LANES + v] = index.feature(r * height + v);
  }
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
        read_features<Unit>(x_part, in_features, i, count, x_slab + i, stride);
        read_rows<Unit>(dy_part, out_features, i, count, features, dy_slab + i * LANES, stride);
      }
#pragma omp for schedule(dynamic)
      for (int64_t r = 0; r < index.num_groups; ++r)
        for (int64_t n = index.begin(r); n < index.end(r); ++n) {
          const int64_t offset = index.tile(n) * width * height;
          const Sums<T> sums{total ? total + offset : nullptr, dw + offset, s == 0,
                             s + 1 == num_slabs};
          for (int64_t v = 0; v < vectors; v += 4) {
            const auto run = v + 4 <= vectors   ? dw_rows<Unit, 4, T>
                             : v + 3 == vectors ? dw_rows<Unit, 3, T>
                             : v + 2 == vectors ? dw_rows<Unit, 2, T>
                                                : dw_rows<Unit, 1, T>;
            run(index, index.columns + n * width, x_slab, stride,
                dy_slab + (r * vectors + v) * LANES * stride, words, sums, v * LANES);
          }
        }
    }
  }
}

}  // namespace
