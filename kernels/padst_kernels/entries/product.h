// y = W x: rows of slabs, summed by row of the weight. dx is the same product with the transposed
// weight, but for few tokens, where every entry adds to a dx that fits a cache.

#pragma once

#include <omp.h>

#include "slabs.h"

namespace {

constexpr int64_t FEW = 8;    // up to so many tokens fill half a vector, not a whole one
constexpr int64_t PARTS = 8;  // of dx, each the sum over some rows of the weight

// y of `count` tokens. `ready` are the staged values, where all are.
template <class Slab, int NV, typename T>
void product_slab(const Weight& weight, const T* x, const T* values,
                  const typename Slab::Value* ready, int64_t count, bool parallel, T* y) {
  constexpr int64_t stride = NV * Slab::WIDTH, tokens = NV * Slab::TOKENS;
  const int64_t in_features = weight.in_features, out_features = weight.out_features;
  float* in = scratch(INPUT, (Slab::TOKENS == 1 ? MAX_FEATURES : in_features) * stride);
  Slab::read(x, in_features, count, in_features, tokens, in, stride);
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t o = 0; o < out_features; o += BLOCK) {
    const int64_t size = std::min(BLOCK, out_features - o);
    const int64_t first = weight.row_from(o), last = weight.row_from(o + size);
    const int64_t begin = weight.pointer[first], end = weight.pointer[last];
    const auto* own =
        ready ? ready + begin : staged<typename Slab::Value>(weight, values, begin, end);
    float* out = scratch(OUTPUT, BLOCK * tokens + LANES);
    int64_t next = o;
    for (int64_t r = first; r < last; ++r, ++next) {
      if (tokens > 1)
        fetch<true>(y + o, out_features, count, size, r - first, (tokens + BLOCK - 1) / BLOCK);
      // Rows without entries are zero.
      for (; next < weight.feature(r); ++next)
        std::memset(out + (next - o) * tokens, 0, tokens * sizeof(float));
      const int64_t at = weight.pointer[r], size = weight.pointer[r + 1] - at;
      if (!ready) {
        if (!weight.order) fetch_far(values + at, size);
        fetch_far(weight.columns + at, size);
      }
      Slab::template row<NV>(in, own + (at - begin), weight.columns + at, size,
                             weight.num_entries - at, out + (next - o) * tokens);
    }
    std::memset(out + (next - o) * tokens, 0, (o + size - next) * tokens * sizeof(float));
    if constexpr (tokens == 1)
      convert(out, y + o, size);
    else
      to_tokens(out, tokens, count, size, y + o, out_features);
    // Now that they are in a cache; with more tokens all were looked at before.
    if (tokens == 1 && !weight.columns_exist(begin, end)) weight.legal = false;
  }
}

template <class Slab, int NV, typename T>
void product_slabs(const Weight& weight, const T* x, const T* values, T* y) {
  constexpr int64_t tokens = NV * Slab::TOKENS, half = (NV + 1) / 2;
  const int64_t num_slabs = (weight.num_tokens + tokens - 1) / tokens;
  const typename Slab::Value* ready = nullptr;
  if (num_slabs > 1)
    ready = staged<typename Slab::Value>(weight, values, 0, weight.used_entries());
  // Few slabs: threads share each of them.
  const bool parallel = weight.threads_pay();
  const bool over_slabs = parallel && num_slabs >= 2 * omp_get_max_threads();
#pragma omp parallel for schedule(static) if (over_slabs)
  for (int64_t s = 0; s < num_slabs; ++s) {
    const int64_t start = s * tokens, count = std::min(tokens, weight.num_tokens - start);
    auto run = count <= half * Slab::TOKENS ? product_slab<Slab, half, T>
                                            : product_slab<Slab, NV, T>;
    run(weight, x + start * weight.in_features, values, ready, count, parallel && !over_slabs,
        y + start * weight.out_features);
  }
}

template <typename T>
bool product(const Weight& weight, const T* x, const T* values, T* y) {
  if (!weight.check_rows()) return false;
  if (weight.num_tokens == 1) {
    product_slab<Token<T>, 1>(weight, x, values, static_cast<const T*>(nullptr), 1,
                              weight.threads_pay(), y);
    return weight.legal;
  }
  if (!weight.check_columns()) return false;
  if (weight.num_tokens <= FEW)
    product_slabs<FewSlabOf<T>, 1>(weight, x, values, y);
  else if (std::is_same_v<T, bfloat16> && weight.in_features > WIDE)
    product_slabs<WideSlabOf<T>, 2>(weight, x, values, y);
  else
    product_slabs<SlabOf<T>, 2>(weight, x, values, y);
  return weight.legal;
}

// dx of up to W tokens; the weight is that of the forward pass, in_features those of dx.
template <int W, typename T>
void scatter(const Weight& weight, const T* dy, const T* values, T* dx) {
  typedef float V __attribute__((vector_size(W * 4), aligned(4), may_alias));
  const int64_t in_features = weight.in_features, out_features = weight.out_features;
  const int64_t parts = weight.threads_pay() ? PARTS : 1;
  float* in = scratch(INPUT, out_features * W);
  if constexpr (W == 1)
    convert(dy, in, out_features);
  else
    Floats<W>::read(dy, out_features, weight.num_tokens, out_features, W, in, W);
  float* sums = scratch(SUMS, parts * in_features * W + LANES);
#pragma omp parallel for schedule(static) if (parts > 1)
  for (int64_t p = 0; p < parts; ++p) {
    V* out = reinterpret_cast<V*>(sums + p * in_features * W);
    std::memset(out, 0, in_features * W * sizeof(float));
    const int64_t stop = out_features * (p + 1) / parts;
    for (int64_t o = out_features * p / parts; o < stop; o += BLOCK) {
      const int64_t size = std::min(BLOCK, stop - o), begin = weight.pointer[o];
      const float* own = staged<float>(weight, values, begin, weight.pointer[o + size]);
      for (int64_t r = o; r < o + size; ++r) {
        const V row = reinterpret_cast<const V*>(in)[r];
        for (int64_t k = weight.pointer[r]; k < weight.pointer[r + 1]; ++k)
          out[weight.columns[k]] += row * own[k - begin];
      }
    }
  }
  for (int64_t p = 1; p < parts; ++p)
    for (int64_t i = 0; i < in_features * W; ++i) sums[i] += sums[p * in_features * W + i];
  if constexpr (W == 1)
    convert(sums, dx, in_features);
  else
    to_tokens(sums, W, weight.num_tokens, in_features, dx, in_features);
}

template <typename T>
bool input_gradient(const Weight& weight, const Weight& transposed, const T* dy, const T* values,
                    T* dx) {
  if (weight.num_tokens > 2 * FEW) return product(transposed, dy, values, dx);
  if (!weight.check_rows() || !weight.check_columns()) return false;
  if (weight.num_tokens == 1)
    scatter<1>(weight, dy, values, dx);
  else if (weight.num_tokens <= FEW)
    scatter<FEW>(weight, dy, values, dx);
  else
    scatter<2 * FEW>(weight, dy, values, dx);
  return weight.legal;
}

}  // namespace
