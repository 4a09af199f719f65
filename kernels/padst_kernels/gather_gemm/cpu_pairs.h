// Pairs of bfloat16 numbers, for CPUs that multiply and add two at a time into float32.

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
        const bfloat16* row = weight + (g * width + k) * height;
        word* out = words + (g * depth + k / 2) * height;
        for (int64_t v = 0; v < height; ++v)
          out[v] = row[v].bits | (k + 1 < width ? row[height + v].bits << 16 : 0);
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
  static const word* x_of_group(const Index& index, int64_t group, int64_t stride,
                                const word* slab) {
    const int64_t width = index.width, depth = (width + 1) / 2;
    const int64_t begin = index.begin(group), end = index.end(group);
    word* out = buffer<Pair>(EXTRA, (end - begin) * depth * stride);
    for (int64_t n = begin; n < end; ++n) {
      const int32_t* column = index.columns + n * width;
      for (int64_t k = 0; k < width; k += 2, out += stride) {
        const int32_t second = k + 1 < width ? column[k + 1] : index.in_features;
        for (int64_t i = 0; i < stride; i += LANES)
          store_words(out + i, select(slab + i, stride, column[k], second));
      }
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
  static const word* dy_of_group(const Index& index, int64_t group, int64_t stride,
                                 const word* slab) {
    const int64_t height = index.height, first = group * height;
    if (!index.positions() && height % 2 == 0) return slab + first / 2 * stride;
    word* out = buffer<Pair>(EXTRA, (height + 1) / 2 * stride);
    for (int64_t v = 0; v < height; v += 2) {
      const int32_t a = index.feature(first + v);
      const int32_t b = v + 1 < height ? index.feature(first + v + 1) : index.out_features;
      for (int64_t i = 0; i < stride; i += LANES)
        store_words(out + v / 2 * stride + i, select(slab + i, stride, a, b));
    }
    return out;
  }

  template <int NROWS, int NV>
  static void put(const vec (&sum)[NROWS][NV], word* out) {
    for (int i = 0; i < NROWS; i += 2)
      for (int v = 0; v < NV; ++v)
        store_words(out + (i / 2 * NV + v) * LANES, rounded(sum[i][v], sum[i + 1][v]));
  }
  static void write_y(const Index& index, const word* slab, int64_t stride, int64_t count,
                      bfloat16* y) {
    const int64_t size = index.out_features;
    const bool in_order = !index.positions() && index.height % 2 == 0;
    // Row groups of odd height have one row more in the slab.
    const auto row = [&](int64_t feature) -> int32_t {
      const int64_t position = index.positions() ? index.positions()[feature] : feature;
      return index.height % 2 ? position + position / index.height : position;
    };
    for (int64_t i = 0; i < count; i += LANES)
      for (int64_t j = 0; j < size; j += 2 * LANES)
        transpose(
            (size - j + 1) / 2, count - i,
            [&](int64_t c, int64_t) {
              const int64_t o = j + 2 * c;
              if (in_order) return load_words(slab + o / 2 * stride + i);
              return select(slab + i, stride, row(o), row(std::min(o + 1, size - 1)));
            },
            [&](int64_t r, vec v, int64_t) {
              store_some(y + (i + r) * size + j, v, std::min<int64_t>(2 * LANES, size - j));
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

  static vec load_words(const word* p) { return *reinterpret_cast<const vec*>(p); }
  static void store_words(word* p, vec v) { *reinterpret_cast<vec*>(p) = v; }
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

  // Features 2i and 2i + 1 in word row i of the slab; further word rows up to `words` are zero.
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
  // Words of features `first` and `second` of LANES tokens.
  static vec select(const word* slab, int64_t stride, int32_t first, int32_t second) {
    uvec lane;
    for (uint32_t j = 0; j < LANES; ++j) lane[j] = 2 * j | (2 * LANES + 2 * j) << 16;
    const vec a = load_words(slab + (first >> 1) * stride);
    const vec b = load_words(slab + (second >> 1) * stride);
    const uint32_t odd = (first & 1) | (second & 1) << 16;
    return (vec)__builtin_shuffle((halves)a, (halves)b, (halves)(lane + odd));
  }
  static vec rounded(vec first, vec second) {
    halves lane;
    for (int j = 0; j < 2 * LANES; ++j) lane[j] = j / 2 + j % 2 * LANES;
    const halves both = (halves)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    return (vec)__builtin_shuffle(both, lane);
  }
};

}  // namespace

#endif
