// Input gradient: the products of each tile are added to a slab of dx, in float32.

#pragma once

#include "cpu_units.h"

namespace {

// dx[column[i]] += sum over v of weight[i][v] * dy[v], for NROWS columns of one tile.
template <class Unit, int NROWS, int NV>
inline void dx_rows(const typename Unit::word* dy, const typename Unit::word* weight,
                    const int32_t* column, int64_t depth, float* dx) {
  constexpr int64_t stride = NV * LANES;
  vec sum[NROWS][NV] = {};
  for (int64_t j = 0; j < depth; ++j, dy += stride) {
    vec in[NV];
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) in[v] = load_words(dy + v * LANES);
    accumulate<Unit>(sum, in, weight + j, depth);
  }
#pragma GCC unroll 16
  for (int i = 0; i < NROWS; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) {
      float* out = dx + column[i] * stride + v * LANES;
      store(out, load(out) + sum[i][v]);
    }
}

template <class Unit, typename T>
void input_gradient(const Index& index, const T* dy, const T* weight, int64_t num_tokens, T* dx) {
  const auto* words = Unit::row_words(index, weight);
  const int64_t width = index.width, depth = (index.height + Unit::PER - 1) / Unit::PER;
  const int64_t in_features = index.in_features;
  in_slabs(index, num_tokens, [&](int64_t start, int64_t count, auto vectors) {
    constexpr int NV = decltype(vectors)::value;
    constexpr int64_t stride = NV * LANES;
    auto* in = buffer<Unit>(INPUT, Unit::dy_words(index) * stride);
    float* out = scratch(OUTPUT, (in_features + 1) * stride);
    Unit::read_dy(index, dy + start * index.out_features, count, stride, in);
    std::memset(out, 0, (in_features + 1) * stride * sizeof(float));
    for (int64_t r = 0; r < index.num_groups; ++r) {
      const auto* rows = Unit::template dy_of_group<NV>(index, r, in);
      for (int64_t n = index.begin(r); n < index.end(r); ++n)
        in_tiles<ROWS>(width, [&](int64_t k, auto tile) {
          dx_rows<Unit, decltype(tile)::value, NV>(
              rows, words + (index.tile(n) * width + k) * depth, index.columns + n * width + k,
              depth, out);
        });
    }
    Unit::write_dx(index, out, stride, count, dx + start * in_features);
  });
}

}  // namespace
