// The gradient of each value: a dot product over tokens of a feature of x and one of dy.

#pragma once

#include "slabs.h"

namespace {

constexpr int64_t GRADIENT_BLOCK = 32;  // features of dy that are transposed at a time
constexpr int64_t STORE = 4096;         // gradients that one thread puts in their places
constexpr int GROUP = LANES < 8 ? LANES : 8;  // entries whose dot products are summed together

typedef float group_vec __attribute__((vector_size(GROUP * 4), aligned(4), may_alias));

// Lane j of the result: the sum of SIZE neighbouring lanes of sums[j % SIZE].
template <int SIZE>
[[gnu::always_inline]] inline vec fold(const vec* sums) {
  if constexpr (SIZE == 1) {
    return sums[0];
  } else {
    constexpr int STEP = SIZE / 2;
    const vec a = fold<STEP>(sums), b = fold<STEP>(sums + STEP);
    ivec low, high;
    for (int j = 0; j < LANES; ++j) {
      low[j] = (j & STEP) ? j - STEP + LANES : j;
      high[j] = (j & STEP) ? j + LANES : j + STEP;
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  }
}

// Lane i: the sum of the lanes of sums[i].
[[gnu::always_inline]] inline group_vec sum_lanes(const vec* sums) {
  vec all = fold<GROUP>(sums);
  if constexpr (LANES > GROUP) {
    ivec other;
    for (int j = 0; j < LANES; ++j) other[j] = (j + GROUP) % LANES;
    all += __builtin_shuffle(all, other);
  }
  group_vec first;
  std::memcpy(&first, &all, sizeof(first));
  return first;
}

// totals[k] (+)= dot product over one slab of tokens, for the entries of one row. `in` is the slab
// of what is gathered, `own` the row of what is not; both are NV vectors long.
template <class Slab, int NV>
void gradient_row(const float* in, const float* own, const uint16_t* columns, int64_t count,
                  bool add, float* totals) {
  vec words[NV];
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) words[v] = load(own + v * LANES);
  const auto group = [&](const uint16_t* columns, auto last) [[gnu::always_inline]] {
    vec sums[GROUP] = {};
#pragma GCC unroll 8
    for (int i = 0; i < GROUP; ++i) {
      const float* row = in + columns[std::min<int64_t>(i, last)] * (NV * LANES);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sums[i] = Slab::dot(sums[i], load(row + v * LANES), words[v]);
    }
    return sum_lanes(sums);
  };
  int64_t k = 0;
  for (; k + GROUP <= count; k += GROUP) {
    group_vec* out = reinterpret_cast<group_vec*>(totals + k);
    const group_vec sums = group(columns + k, std::integral_constant<int64_t, GROUP - 1>());
    *out = add ? *out + sums : sums;
  }
  if (k == count) return;
  const group_vec sums = group(columns + k, count - 1 - k);
  for (int i = 0; k + i < count; ++i) totals[k + i] = add ? totals[k + i] + sums[i] : sums[i];
}

template <class Slab, int NV, typename T>
void gradient_slab(const Weight& weight, const T* x, const T* dy, int64_t count, bool add,
                   float* totals) {
  constexpr int64_t stride = NV * LANES;
  const int64_t in_features = weight.in_features, out_features = weight.out_features;
  float* in = scratch(INPUT, in_features * stride);
#pragma omp parallel if (weight.threads_pay())
  {
#pragma omp for schedule(static)
    for (int v = 0; v < NV; ++v)
      Slab::read(x + v * Slab::TOKENS * in_features, in_features, count - v * Slab::TOKENS,
                 in_features, Slab::TOKENS, in + v * LANES, stride);
#pragma omp for schedule(static)
    for (int64_t o = 0; o < out_features; o += GRADIENT_BLOCK) {
      const int64_t size = std::min(GRADIENT_BLOCK, out_features - o);
      float* own = scratch(OUTPUT, GRADIENT_BLOCK * stride);
      Slab::read(dy + o, out_features, count, size, NV * Slab::TOKENS, own, stride);
      for (int64_t r = o; r < o + size; ++r) {
        fetch<false>(dy + o + size, out_features, count,
                     std::min(GRADIENT_BLOCK, out_features - o - size), r - o,
                     (count + GRADIENT_BLOCK - 1) / GRADIENT_BLOCK);
        const int64_t at = weight.pointer[r];
        gradient_row<Slab, NV>(in, own + (r - o) * stride, weight.columns + at,
                               weight.pointer[r + 1] - at, add, totals + at);
      }
    }
  }
}

template <typename T>
bool values_gradient(const Weight& weight, const T* x, const T* dy, T* dvalues) {
  typedef SlabOf<T> Slab;
  if (!weight.check_rows() || !weight.check_columns()) return false;
  const int64_t used = weight.used_entries();
  const bool direct = std::is_same_v<T, float> && !weight.order;
  float* totals = direct ? reinterpret_cast<float*>(dvalues) : scratch(SUMS, used);
  if (!weight.num_tokens) std::memset(totals, 0, used * sizeof(float));
  // Slabs of equal length, which fit a cache.
  const int64_t vectors = (weight.num_tokens + Slab::TOKENS - 1) / Slab::TOKENS;
  const int64_t longest = weight.in_features <= WIDE ? 8 : 4;
  const int64_t num_slabs = (vectors + longest - 1) / longest;
  for (int64_t s = 0, start = 0; s < num_slabs; ++s) {
    const int64_t left = vectors - start / Slab::TOKENS;
    const int64_t own = (left + num_slabs - s - 1) / (num_slabs - s);
    const int64_t count = std::min(own * Slab::TOKENS, weight.num_tokens - start);
    static constexpr decltype(&gradient_slab<Slab, 1, T>) runs[] = {
        gradient_slab<Slab, 1, T>, gradient_slab<Slab, 2, T>, gradient_slab<Slab, 3, T>,
        gradient_slab<Slab, 4, T>, gradient_slab<Slab, 5, T>, gradient_slab<Slab, 6, T>,
        gradient_slab<Slab, 7, T>, gradient_slab<Slab, 8, T>};
    runs[own - 1](weight, x + start * weight.in_features, dy + start * weight.out_features, count,
                  s > 0, totals);
    start += count;
  }
  // Padding has no gradient.
  if (!weight.order) {
    if (!direct) convert(totals, dvalues, used);
    for (int64_t k = used; k < weight.num_entries; ++k) narrow(0, dvalues + k);
    return true;
  }
#pragma omp parallel for schedule(static) if (weight.threads_pay())
  for (int64_t b = 0; b < weight.num_entries; b += STORE) {
    uint32_t highest = 0;
    for (int64_t k = b; k < std::min(b + STORE, weight.num_entries); ++k)
      narrow(k < used ? totals[k] : 0.0f, dvalues + weight.place(k, highest));
    weight.check_places(highest);
  }
  return weight.legal;
}

}  // namespace
