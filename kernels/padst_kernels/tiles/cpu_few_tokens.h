// Forward pass of few tokens, where reading the weight is all that counts: lanes hold rows of y,
// and the weight is read once, as it is.

#pragma once

#include "cpu_units.h"

namespace {

constexpr int64_t FEW = LANES / 2;

// NT tokens of one row group, with NV vectors of rows in the lanes.
template <int NT, int NV, typename T>
inline void few_rows(const Index& index, int64_t group, const float* x, const T* weight, T* y) {
  const int64_t width = index.width, height = index.height;
  vec sum[NT][NV] = {};
  for (int64_t n = index.begin(group); n < index.end(group); ++n) {
    const T* w = weight + index.tile(n) * width * height;
    const int32_t* column = index.columns + n * width;
    for (int64_t k = 0; k < width; ++k, w += height) {
      vec rows[NV];
      for (int v = 0; v < NV; ++v) rows[v] = load(w + v * LANES);
      for (int t = 0; t < NT; ++t) {
        const vec in = splat(x[t * (index.in_features + 1) + column[k]]);
        for (int v = 0; v < NV; ++v) sum[t][v] += in * rows[v];
      }
    }
  }
  for (int t = 0; t < NT; ++t)
    for (int v = 0; v < NV; ++v) store(y + t * index.num_rows() + v * LANES, sum[t][v]);
}

template <int NT, typename T>
void few_group(const Index& index, int64_t group, const float* x, const T* weight, T* y) {
  const int64_t width = index.width, height = index.height;
  int64_t i = 0;
  for (; i + 4 * LANES <= height; i += 4 * LANES)
    few_rows<NT, 4>(index, group, x, weight + i, y + i);
  for (; i + LANES <= height; i += LANES) few_rows<NT, 1>(index, group, x, weight + i, y + i);
  for (int t = 0; t < NT && i < height; ++t) {
    vec sum = {};
    for (int64_t n = index.begin(group); n < index.end(group); ++n)
      for (int64_t k = 0; k < width; ++k)
        sum += splat(x[t * (index.in_features + 1) + index.columns[n * width + k]]) *
               load(weight + (index.tile(n) * width + k) * height + i, height - i);
    store(y + t * index.num_rows() + i, sum, height - i);
  }
}

template <typename T>
void forward_few(const Index& index, const T* x, const T* weight, int64_t num_tokens, T* y) {
  const int64_t in_features = index.in_features, stride = in_features + 1;
  float* wide = scratch(INPUT, num_tokens * stride);
  for (int64_t t = 0; t < num_tokens; ++t) {
    convert(x + t * in_features, wide + t * stride, in_features);
    wide[t * stride + in_features] = 0;
  }
  const bool direct = !index.positions() && index.num_rows() == index.out_features;
  T* rows = direct ? y : reinterpret_cast<T*>(scratch(OUTPUT, num_tokens * index.num_rows()));
#pragma omp parallel for schedule(static) if (index.threads_pay(1))
  for (int64_t r = 0; r < index.num_groups; ++r) {
    T* out = rows + r * index.height;
    int64_t t = 0;
    for (; t + 4 <= num_tokens; t += 4)
      few_group<4>(index, r, wide + t * stride, weight, out + t * index.num_rows());
    for (; t < num_tokens; ++t)
      few_group<1>(index, r, wide + t * stride, weight, out + t * index.num_rows());
  }
  if (direct) return;
  const int32_t* positions = index.positions();
  for (int64_t t = 0; t < num_tokens; ++t)
    for (int64_t o = 0; o < index.out_features; ++o)
      y[t * index.out_features + o] = rows[t * index.num_rows() + (positions ? positions[o] : o)];
}

}  // namespace
