// Rows with inputs of their own, condensed, in float32 on a CPU. GCC vector extensions.
//
// One token: a dot product of each row with gathered inputs. More: a slab of tokens is transposed,
// then each entry adds one vector of tokens times its value. Shape letters: T tokens, I and O
// features in and out, N rows that have entries.

#include "simd.h"

namespace {

constexpr int64_t SLAB = 2 * LANES;         // tokens of a slab
constexpr int64_t PARALLEL_FROM = 1 << 17;  // multiplications below which threads do not pay

inline float dot(const float* x, const float* values, const uint16_t* columns, int64_t count) {
  // Scalar loads: gather instructions are slower on some CPUs and no faster on the others.
  float sum[8] = {};
  int64_t k = 0;
  for (; k + 8 <= count; k += 8)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum[i] += x[columns[k + i]] * values[k + i];
  for (; k < count; ++k) sum[0] += x[columns[k]] * values[k];
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

template <int NV>
inline void slab_row(const float* x, const float* values, const uint16_t* columns, int64_t count,
                     float* out) {
  constexpr int64_t stride = NV * LANES;
  constexpr int CHAINS = NV == 1 ? 4 : 2;
  vec sum[CHAINS][NV] = {};
  int64_t k = 0;
  for (; k + CHAINS <= count; k += CHAINS)
#pragma GCC unroll 4
    for (int i = 0; i < CHAINS; ++i) {
      const vec value = splat(values[k + i]);
      const float* row = x + columns[k + i] * stride;
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[i][v] += value * load(row + v * LANES);
    }
  for (; k < count; ++k)
    for (int v = 0; v < NV; ++v)
      sum[0][v] += splat(values[k]) * load(x + columns[k] * stride + v * LANES);
  for (int v = 0; v < NV; ++v) {
    for (int i = 1; i < CHAINS; ++i) sum[0][v] += sum[i][v];
    store(out + v * LANES, sum[0][v]);
  }
}

template <int NV>
void slab(const float* x, const float* values, const uint16_t* columns, const int32_t* pointer,
          const int32_t* rows, int64_t num_rows, int64_t in_features, int64_t out_features,
          int64_t count, float* y) {
  constexpr int64_t stride = NV * LANES;
  float* in = scratch(0, (in_features + LANES) * stride);
  float* out = in + in_features * stride;
  to_features(x, in_features, count, in_features, stride, nullptr, in, stride);
  // Rows of y are written LANES at a time where they follow each other.
  for (int64_t r = 0; r < num_rows;) {
    const int64_t n = std::min<int64_t>(LANES, num_rows - r);
    for (int64_t i = r; i < r + n; ++i)
      slab_row<NV>(in, values + pointer[i], columns + pointer[i], pointer[i + 1] - pointer[i],
                   out + (i - r) * stride);
    if (rows[r + n - 1] - rows[r] == n - 1) {
      to_tokens(out, stride, count, n, nullptr, y + rows[r], out_features);
    } else {
      for (int64_t t = 0; t < count; ++t)
        for (int64_t i = 0; i < n; ++i) y[t * out_features + rows[r + i]] = out[i * stride + t];
    }
    r += n;
  }
}

}  // namespace

// y must hold zeros; rows without entries stay so. sizes: T, I, O, N, entries. Row r of the N owns
// the entries from pointer[r] to pointer[r + 1] and is feature rows[r] of y.
extern "C" void padst_fan_in(const float* x, const float* values, const uint16_t* columns,
                             const int32_t* pointer, const int32_t* rows, const int64_t* sizes,
                             float* y) {
  const int64_t num_tokens = sizes[0], in_features = sizes[1], out_features = sizes[2];
  const int64_t num_rows = sizes[3], num_entries = sizes[4];
  const bool parallel = num_tokens * num_entries > PARALLEL_FROM;
  if (num_tokens == 1) {
#pragma omp parallel for schedule(static) if (parallel)
    for (int64_t r = 0; r < num_rows; ++r)
      y[rows[r]] = dot(x, values + pointer[r], columns + pointer[r], pointer[r + 1] - pointer[r]);
    return;
  }
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t start = 0; start < num_tokens; start += SLAB) {
    const int64_t count = std::min(SLAB, num_tokens - start);
    auto run = count <= LANES ? slab<1> : slab<2>;
    run(x + start * in_features, values, columns, pointer, rows, num_rows, in_features,
        out_features, count, y + start * out_features);
  }
}
