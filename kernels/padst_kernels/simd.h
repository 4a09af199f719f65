// Vectors, scratch memory and transpositions of the CPU kernels. GCC vector extensions.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));

inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }
inline vec splat(float s) { return s - vec{}; }

// Storage of one thread that lasts: page faults of fresh memory cost more than the product.
float* scratch(int which, int64_t size) {
  struct Buffer {
    float* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffers[2];
  Buffer& buffer = buffers[which];
  if (buffer.size < size) {
    std::free(buffer.data);
    buffer.size = (size + 1023) / 1024 * 1024;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, buffer.size * sizeof(float)));
  }
  return buffer.data;
}

template <int STEP>
inline void transpose_step(vec* rows) {
  ivec low, high;
  for (int j = 0; j < LANES; ++j) {
    low[j] = (j & STEP) ? j - STEP + LANES : j;
    high[j] = (j & STEP) ? j + LANES : j + STEP;
  }
  for (int i = 0; i < LANES; ++i) {
    if (i & STEP) continue;
    vec a = rows[i], b = rows[i + STEP];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + STEP] = __builtin_shuffle(a, b, high);
  }
}

inline void transpose_square(vec* rows) {
  transpose_step<1>(rows);
  transpose_step<2>(rows);
  if constexpr (LANES >= 8) transpose_step<4>(rows);
  if constexpr (LANES >= 16) transpose_step<8>(rows);
}

// out[j][i] = in[i][j] for i < num_rows, j < num_columns; `in` rows are `in_stride` apart. Where
// `index` is given, column j goes to row index[j] of `out`. Rows up to `padded_rows` read as zero.
void to_features(const float* in, int64_t in_stride, int64_t num_rows, int64_t num_columns,
                 int64_t padded_rows, const int32_t* index, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < padded_rows; i += LANES) {
    const int64_t height = std::min<int64_t>(LANES, num_rows - i);
    int64_t j = 0;
    for (; j + LANES <= num_columns; j += LANES) {
      vec square[LANES];
      for (int r = 0; r < LANES; ++r)
        square[r] = r < height ? load(in + (i + r) * in_stride + j) : vec{};
      transpose_square(square);
      for (int c = 0; c < LANES; ++c)
        store(out + (index ? index[j + c] : j + c) * out_stride + i, square[c]);
    }
    for (; j < num_columns; ++j)
      for (int64_t r = 0; r < LANES; ++r)
        out[(index ? index[j] : j) * out_stride + i + r] =
            r < height ? in[(i + r) * in_stride + j] : 0.0f;
  }
}

// The way back: out[i][j] = in[index[j]][i].
void to_tokens(const float* in, int64_t in_stride, int64_t num_rows, int64_t num_columns,
               const int32_t* index, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < num_rows; i += LANES) {
    const int64_t height = std::min<int64_t>(LANES, num_rows - i);
    int64_t j = 0;
    for (; j + LANES <= num_columns; j += LANES) {
      vec square[LANES];
      for (int c = 0; c < LANES; ++c)
        square[c] = load(in + (index ? index[j + c] : j + c) * in_stride + i);
      transpose_square(square);
      for (int64_t r = 0; r < height; ++r) store(out + (i + r) * out_stride + j, square[r]);
    }
    for (; j < num_columns; ++j)
      for (int64_t r = 0; r < height; ++r)
        out[(i + r) * out_stride + j] = in[(index ? index[j] : j) * in_stride + i + r];
  }
}

}  // namespace
