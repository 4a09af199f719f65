// Vectors, element types, scratch memory and transpositions of the CPU kernels. GCC vector
// extensions. Arithmetic is in float; elements in memory may be half precision.

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
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef uint16_t half_vec __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline vec splat(float s) { return s - vec{}; }

inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }

// LANES elements of 16 bits, each in the low half of a lane.
template <typename T>
inline uvec load_bits(const T* p) {
  return __builtin_convertvector(*reinterpret_cast<const half_vec*>(p), uvec);
}
template <typename T>
inline void store_bits(T* p, uvec bits) {
  *reinterpret_cast<half_vec*>(p) = __builtin_convertvector(bits, half_vec);
}

inline vec load(const bfloat16* p) { return (vec)(load_bits(p) << 16); }

inline void store(bfloat16* p, vec v) {
  const uvec bits = (uvec)v;
  // To nearest, ties to even; the carry of a NaN could run into its sign.
  const uvec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  store_bits(p, v != v ? uvec{} + 0x7fc0 : rounded);
}

inline vec load(const float16* p) {
  const uvec bits = load_bits(p);
  const vec magnitude = (vec)((bits & 0x7fff) << 13) * 0x1p112f;
  const uvec beyond = (bits & 0x7c00) == 0x7c00 ? uvec{} + 0x7f800000 : uvec{};
  return (vec)((uvec)magnitude | beyond | (bits & 0x8000) << 16);
}

inline void store(float16* p, vec v) {
  const uvec sign = (uvec)v >> 16 & 0x8000, magnitude = (uvec)v & 0x7fffffff;
  const uvec normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  // The last place of a float from 0.5 up is that of a half below 2^-14.
  const uvec tiny = (uvec)((vec)magnitude + 0.5f) - 0x3f000000;
  uvec bits = magnitude < (113u << 23) ? tiny : normal;
  bits = magnitude >= 0x477ff000 ? uvec{} + 0x7c00 : bits;
  store_bits(p, sign | (v != v ? uvec{} + 0x7e00 : bits));
}

// The first n lanes only.
template <typename T>
inline vec load(const T* p, int64_t n) {
  if (n == LANES) return load(p);
  T part[LANES] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <typename T>
inline void store(T* p, vec v, int64_t n) {
  if (n == LANES) return store(p, v);
  T part[LANES];
  store(part, v);
  std::memcpy(p, part, n * sizeof(T));
}

template <typename From, typename To>
inline void convert(const From* in, To* out, int64_t size) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) store(out + i, load(in + i));
  if (i < size) store(out + i, load(in + i, size - i), size - i);
}

// Storage of one thread that lasts: page faults of fresh memory cost more than the product.
float* scratch(int which, int64_t size) {
  struct Buffer {
    float* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffers[4];
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

// Turns up to LANES vectors read(row, num_columns) into up to LANES of write(column, v, num_rows);
// rows from `num_rows` on read as zero.
template <typename Read, typename Write>
[[gnu::always_inline]] inline void transpose(int64_t num_rows, int64_t num_columns, Read read,
                                             Write write) {
  if (num_rows >= LANES && num_columns >= LANES) {  // stays in registers
    vec square[LANES];
    for (int r = 0; r < LANES; ++r) square[r] = read(r, LANES);
    transpose_square(square);
    for (int c = 0; c < LANES; ++c) write(c, square[c], LANES);
    return;
  }
  num_rows = std::min<int64_t>(LANES, num_rows);
  num_columns = std::min<int64_t>(LANES, num_columns);
  vec square[LANES] = {};
  for (int64_t r = 0; r < num_rows; ++r) square[r] = read(r, num_columns);
  transpose_square(square);
  for (int64_t c = 0; c < num_columns; ++c) write(c, square[c], num_rows);
}

// out[j][i] = in[i][j] for i < num_rows, j < num_columns; `in` rows are `in_stride` apart. Where
// `index` is given, column j goes to row index[j] of `out`. Rows up to `padded_rows`, a multiple
// of LANES, read as zero.
template <typename T>
void to_features(const T* in, int64_t in_stride, int64_t num_rows, int64_t num_columns,
                 int64_t padded_rows, const int32_t* index, float* out, int64_t out_stride) {
  const auto to = [&](auto row) {
    for (int64_t i = 0; i < padded_rows; i += LANES)
      for (int64_t j = 0; j < num_columns; j += LANES)
        transpose(
            num_rows - i, num_columns - j,
            [&](int64_t r, int64_t n) { return load(in + (i + r) * in_stride + j, n); },
            [&](int64_t c, vec v, int64_t) { store(out + row(j + c) * out_stride + i, v); });
  };
  if (index)
    to([&](int64_t j) -> int64_t { return index[j]; });
  else
    to([](int64_t j) { return j; });
}

// The way back: out[i][j] = in[j][i].
template <typename T>
void to_tokens(const float* in, int64_t in_stride, int64_t num_rows, int64_t num_columns, T* out,
               int64_t out_stride) {
  for (int64_t i = 0; i < num_rows; i += LANES)
    for (int64_t j = 0; j < num_columns; j += LANES)
      transpose(
          num_columns - j, num_rows - i,
          [&](int64_t c, int64_t) { return load(in + (j + c) * in_stride + i); },
          [&](int64_t r, vec v, int64_t n) { store(out + (i + r) * out_stride + j, v, n); });
}

}  // namespace
