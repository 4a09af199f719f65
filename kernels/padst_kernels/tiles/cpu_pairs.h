// Pairs of bfloat16 numbers, for CPUs that multiply and add two at a time into float32. They take
// denormal numbers, below 1e-38, for zero.

#pragma once

#include "cpu_units.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace {

struct Pair {
  typedef uint32_t word __attribute__((aligned(2), may_alias));
  static constexpr int PER = 2;
  static vec broadcast(word w) { return (vec)(w + uvec{}); }
  static vec multiply_add(vec a, vec b, vec sum) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

  static word* column_words(const Index& index, const bfloat16* weight) {
    const int64_t width = index.width, height = index.height, depth = (width + 1) / 2;
    // A register tile may reach over the last row.
    word* words = buffer<Pair>(WEIGHT, index.num_tiles * depth * height + 1);
#pragma omp parallel for if (index.threads_pay(1))
    for (int64_t g = 0; g < index.num_tiles; ++g)
      for (int64_t k = 0; k < width; k += 2) {
        const bfloat16* rows = weight + (g * width + k) * height;
        float* out = reinterpret_cast<float*>(words) + (g * depth + k / 2) * height;
        for (int64_t v = 0; v < height; v += LANES) {
          const int64_t n = std::min<int64_t>(LANES, height - v);
          store(out + v, load_tokens(rows + v, height, 0, width - k, n), n);
        }
      }
    return words;
  }
  static const word* row_words(const Index& index, const bfloat16* weight) {
    const int64_t height = index.height, num_columns = index.num_tiles * index.width;
    if (height % 2 == 0) return reinterpret_cast<const word*>(weight);
    word* words = buffer<Pair>(WEIGHT, num_columns * (height + 1) / 2);
    for (int64_t k = 0; k < num_columns; ++k)
      pairs_of(weight + k * height, height, words + k * (height + 1) / 2);
    return words;
  }

  static int64_t x_words(const Index& index) { return index.in_features / 2 + 1; }
  static void read_x(const Index& index, const bfloat16* x, int64_t count, int64_t stride,
                     word* slab) {
    read(x, index.in_features, count, stride, slab, x_words(index));
  }
  template <int NV>
  static const word* x_of_group(const Index& index, int64_t group, const word* slab) {
    constexpr int64_t stride = NV * LANES;
    const int64_t width = index.width, depth = (width + 1) / 2;
    const int64_t begin = index.begin(group), end = index.end(group);
    word* out = buffer<Pair>(EXTRA, (end - begin) * depth * stride);
    for (int64_t n = begin; n < end; ++n) {
      const int32_t* column = index.columns + n * width;
      for (int64_t k = 0; k < width; k += 2, out += stride)
        select<NV>(slab, column[k], k + 1 < width ? column[k + 1] : index.in_features, out);
    }
    return buffer<Pair>(EXTRA, 0);
  }

  static int64_t dy_words(const Index& index) {
    return std::max(index.num_rows(), index.out_features) / 2 + 1;
  }
  static void read_dy(const Index& index, const bfloat16* dy, int64_t count, int64_t stride,
                      word* slab) {
    read(dy, index.out_features, count, stride, slab, dy_words(index));
  }
  template <int NV>
  static const word* dy_of_group(const Index& index, int64_t group, const word* slab) {
    constexpr int64_t stride = NV * LANES;
    const int64_t height = index.height, first = group * height;
    if (in_pairs(index)) return slab + first / 2 * stride;
    word* out = buffer<Pair>(EXTRA, (height + 1) / 2 * stride);
    for (int64_t v = 0; v < height; v += 2)
      select<NV>(slab, index.feature(first + v),
                 v + 1 < height ? index.feature(first + v + 1) : index.out_features,
                 out + v / 2 * stride);
    return out;
  }

  // Rows that are no neighbouring features are rounded one by one, LANES tokens to 32 bytes.
  static int64_t y_words(const Index& index) {
    return std::max(index.num_rows(), index.out_features) / 2 + 1;
  }
  template <int NROWS, int NV>
  static void put(const Index& index, int64_t row, int64_t end, const vec (&sum)[NROWS][NV],
                  word* slab) {
    if (in_pairs(index)) {
#pragma GCC unroll 8
      for (int i = 0; i < NROWS; i += 2)
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v)
          store_words(slab + ((row + i) / 2 * NV + v) * LANES, rounded(sum[i][v], sum[i + 1][v]));
      return;
    }
#pragma GCC unroll 16
    for (int i = 0; i < NROWS; ++i) {
      // A pair may reach over the row group.
      if (NROWS == 2 && row + i == end) return;
      auto* out = reinterpret_cast<__m256i*>(slab) + index.feature(row + i) * NV;
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v)
        _mm256_storeu_si256(out + v, (__m256i)_mm512_cvtneps_pbh((__m512)sum[i][v]));
    }
  }
  static void write_y(const Index& index, const word* slab, int64_t stride, int64_t count,
                      bfloat16* y) {
    if (in_pairs(index))
      return write(index.out_features, count, y, [&](int64_t feature, int64_t i) {
        return load_words(slab + feature / 2 * stride + i);
      });
    // An odd feature at the end takes the row of padding along.
    write(index.out_features, count, y, [&](int64_t feature, int64_t i) {
      const auto* first = reinterpret_cast<const __m256i*>(slab) + (feature * stride + i) / LANES;
      return pair(first, first + stride / LANES);
    });
  }
  static void write_dx(const Index& index, const float* slab, int64_t stride, int64_t count,
                       bfloat16* dx) {
    write(index.in_features, count, dx, [&](int64_t feature, int64_t i) {
      const float* first = slab + feature * stride + i;
      return rounded(load(first), load(first + stride));
    });
  }

  static vec load_tokens(const bfloat16* x, int64_t stride, int64_t i, int64_t num_tokens,
                         int64_t n) {
    if (2 * i >= num_tokens) return vec{};
    x += 2 * i * stride;
    const uvec first = (uvec)load(x, n) >> 16;
    return (vec)(2 * i + 1 < num_tokens ? first | (uvec)load(x + stride, n) : first);
  }

 private:
  typedef uint16_t halves __attribute__((vector_size(LANES * 4)));

  static void store_some(bfloat16* p, vec v, int64_t n) {
    if (n == 2 * LANES)
      store_words(reinterpret_cast<word*>(p), v);
    else
      std::memcpy(p, &v, n * sizeof(bfloat16));
  }
  static vec pairs_at(const bfloat16* p, int64_t n) {
    if (n >= 2 * LANES) return load_words(reinterpret_cast<const word*>(p));
    vec v = {};
    std::memcpy(&v, p, n * sizeof(bfloat16));
    return v;
  }
  static void pairs_of(const bfloat16* in, int64_t size, word* out) {
    for (int64_t i = 0; i < size; i += 2)
      out[i / 2] = in[i].bits | (i + 1 < size ? in[i + 1].bits << 16 : 0);
  }

  // Whether neighbouring rows are neighbouring features, in pairs.
  static bool in_pairs(const Index& index) { return !index.rows && index.height % 2 == 0; }
  // Features 2i and 2i + 1 to word row i of the slab; further word rows up to `words` are zero.
  static void read(const bfloat16* in, int64_t size, int64_t count, int64_t stride, word* slab,
                   int64_t words) {
    for (int64_t i = 0; i < stride; i += LANES)
      for (int64_t j = 0; j < size; j += 2 * LANES)
        transpose(
            count - i, (size - j + 1) / 2,
            [&](int64_t r, int64_t) { return pairs_at(in + (i + r) * size + j, size - j); },
            [&](int64_t c, vec v, int64_t) { store_words(slab + (j / 2 + c) * stride + i, v); });
    const int64_t used = (size + 1) / 2;
    std::memset(slab + used * stride, 0, (words - used) * stride * sizeof(word));
  }
  // The way back: read(o, i) gives features o and o + 1 of LANES tokens from i on.
  template <typename Read>
  static void write(int64_t size, int64_t count, bfloat16* out, Read read) {
    for (int64_t i = 0; i < count; i += LANES)
      for (int64_t j = 0; j < size; j += 2 * LANES)
        transpose(
            (size - j + 1) / 2, count - i, [&](int64_t c, int64_t) { return read(j + 2 * c, i); },
            [&](int64_t r, vec v, int64_t) {
              store_some(out + (i + r) * size + j, v, std::min<int64_t>(2 * LANES, size - j));
            });
  }
  // Words of features `first` and `second` of NV vectors of tokens.
  template <int NV>
  static void select(const word* slab, int32_t first, int32_t second, word* out) {
    uvec lane;
    for (uint32_t j = 0; j < LANES; ++j) lane[j] = 2 * j | (2 * LANES + 2 * j) << 16;
    const halves mask = (halves)(lane + ((first & 1) | (second & 1) << 16));
    constexpr int64_t stride = NV * LANES;
    const word *a = slab + (first >> 1) * stride, *b = slab + (second >> 1) * stride;
    for (int v = 0; v < NV; ++v, a += LANES, b += LANES)
      store_words(out + v * LANES,
                  (vec)__builtin_shuffle((halves)load_words(a), (halves)load_words(b), mask));
  }
  static vec pair(const __m256i* low, const __m256i* high) {
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(low)),
                                            _mm256_loadu_si256(high), 1);
    return (vec)_mm512_permutexvar_epi16(to_pairs(), both);
  }
  static vec rounded(vec first, vec second) {
    const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    return (vec)_mm512_permutexvar_epi16(to_pairs(), both);
  }
  // Makes pairs of the two halves of a vector.
  static __m512i to_pairs() {
    halves lane;
    for (int j = 0; j < 2 * LANES; ++j) lane[j] = j / 2 + j % 2 * LANES;
    return (__m512i)lane;
  }
};

}  // namespace

#endif
