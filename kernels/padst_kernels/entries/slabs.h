// What the rows of a condensed weight are multiplied with: slabs of tokens, transposed, so that an
// entry adds its value times one row of a slab.
//
// A kind of slab says how many tokens a vector of a row holds (TOKENS), how many floats that takes
// (WIDTH), in which type it wants the values, and computes one row of y at a time.

#pragma once

#include "weight.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

// Columns are 16 bits wide, and so stay inside a buffer of this many rows whatever they hold.
constexpr int64_t MAX_FEATURES = 1 << 16;
constexpr int64_t WIDE = 1536;  // features above which a slab leaves the first-level cache

typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint16_t quad_bits __attribute__((vector_size(8), aligned(2), may_alias));

inline quad load_quad(const float* p) { return *reinterpret_cast<const quad*>(p); }
inline quad load_quad(const bfloat16* p) {
  typedef int32_t words __attribute__((vector_size(16)));
  return (quad)(__builtin_convertvector(*reinterpret_cast<const quad_bits*>(p), words) << 16);
}
inline quad load_quad(const float16* p) {
  return quad{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}

// One token. T is the type of the values.
template <typename T>
struct Token {
  typedef T Value;
  static constexpr int64_t WIDTH = 1, TOKENS = 1;

  static void read(const T* x, int64_t, int64_t, int64_t num_features, int64_t, float* slab,
                   int64_t) {
    convert(x, slab, num_features);
  }

  // Scalar loads: gather instructions are slower on some CPUs, no faster on the others. Four
  // columns come in one load, since a CPU makes few loads at a time.
  static quad take(const float* x, const uint16_t* columns) {
    const quad_bits four = *reinterpret_cast<const quad_bits*>(columns);
    const auto c = (uint64_t)four;
    return quad{x[c & 0xffff], x[c >> 16 & 0xffff], x[c >> 32 & 0xffff], x[c >> 48]};
  }

  template <int NV>
  static void row(const float* slab, const T* values, const uint16_t* columns, int64_t count,
                  int64_t, float* out) {
    quad sum = {}, other = {};
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) {
      sum += take(slab, columns + k) * load_quad(values + k);
      other += take(slab, columns + k + 4) * load_quad(values + k + 4);
    }
    if (k + 4 <= count) {
      sum += take(slab, columns + k) * load_quad(values + k);
      k += 4;
    }
    for (; k < count; ++k) other[0] += slab[columns[k]] * widen(values[k]);
    sum += other;
    *out = (sum[0] + sum[2]) + (sum[1] + sum[3]);
  }
};

// Tokens in float, `W` to a vector.
template <int W>
struct Floats {
  typedef float Value;
  typedef float V __attribute__((vector_size(W * 4), aligned(4), may_alias));
  static constexpr int64_t WIDTH = W, TOKENS = W;

  template <typename T>
  static void read(const T* x, int64_t x_stride, int64_t num_tokens, int64_t num_features,
                   int64_t padded, float* slab, int64_t stride) {
    for (int64_t t = 0; t < padded; t += LANES)
      for (int64_t i = 0; i < num_features; i += LANES)
        transpose(
            num_tokens - t, num_features - i,
            [&](int64_t r, int64_t n) { return load(x + (t + r) * x_stride + i, n); },
            [&](int64_t c, vec v, int64_t) {
              std::memcpy(slab + (i + c) * stride + t, &v, std::min<int64_t>(W, LANES) * 4);
            });
  }

  template <int NV>
  static void row(const float* slab, const float* values, const uint16_t* columns, int64_t count,
                  int64_t, float* out) {
    constexpr int CHAINS = NV == 1 ? 4 : 2;
    V sum[CHAINS][NV] = {};
    const auto add = [&](V(&to)[NV], int64_t k) {
      const V* in = reinterpret_cast<const V*>(slab + columns[k] * (NV * W));
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) to[v] += values[k] * in[v];
    };
    int64_t k = 0;
    for (; k + CHAINS <= count; k += CHAINS)
#pragma GCC unroll 4
      for (int i = 0; i < CHAINS; ++i) add(sum[i], k + i);
    for (; k < count; ++k) add(sum[0], k);
    for (int v = 0; v < NV; ++v) {
      for (int i = 1; i < CHAINS; ++i) sum[0][v] += sum[i][v];
      reinterpret_cast<V*>(out)[v] = sum[0][v];
    }
  }

  static vec dot(vec sum, vec x, vec dy) { return sum + x * dy; }
};

// Tokens in bfloat16, a pair in each word: token t low, token t + LANES high.
template <bool FAR>
struct Pairs {
  typedef bfloat16 Value;
  static constexpr int64_t WIDTH = LANES, TOKENS = 2 * LANES;

  static void read(const bfloat16* x, int64_t x_stride, int64_t num_tokens, int64_t num_features,
                   int64_t padded, float* slab, int64_t stride) {
    for (int64_t t = 0; t < padded; t += TOKENS)
      for (int64_t i = 0; i < num_features; i += LANES)
        transpose(
            num_tokens - t, num_features - i,
            [&](int64_t r, int64_t n) {
              const bfloat16* low = x + (t + r) * x_stride + i;
              const uvec word = (uvec)load(low, n) >> 16;
              if (t + r + LANES >= num_tokens) return (vec)word;
              return (vec)(word | (uvec)load(low + LANES * x_stride, n));
            },
            [&](int64_t c, vec v, int64_t) { store(slab + (i + c) * stride + t / 2, v); });
  }

#ifdef __AVX512BF16__
  // Products of pairs sum over neighbours in a word, which are made neighbours in pairs of rows.
  struct Sum {
    __m512 first, second;
  };
  static void add(Sum& sum, __m512i row, __m512i next, uint32_t values) {
    const auto pair = (__m512bh)_mm512_set1_epi32(values);
    sum.first = _mm512_dpbf16_ps(sum.first, (__m512bh)_mm512_unpacklo_epi16(row, next), pair);
    sum.second = _mm512_dpbf16_ps(sum.second, (__m512bh)_mm512_unpackhi_epi16(row, next), pair);
  }
  static void add_two(Sum& sum, const float* row, const float* next, const bfloat16* values) {
    uint32_t pair;
    std::memcpy(&pair, values, 4);
    add(sum, _mm512_loadu_si512(row), _mm512_loadu_si512(next), pair);
  }
  static void add_one(Sum& sum, const float* row, bfloat16 value) {
    add(sum, _mm512_loadu_si512(row), _mm512_setzero_si512(), value.bits);
  }
  static void put(const Sum& sum, float* out) {
    const ivec low = {0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30};
    store(out, __builtin_shuffle((vec)sum.first, (vec)sum.second, low));
    store(out + LANES, __builtin_shuffle((vec)sum.first, (vec)sum.second, low + 1));
  }
  static vec dot(vec sum, vec x, vec dy) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)dy);
  }
#else
  struct Sum {
    vec first, second;
  };
  static vec low(vec words) { return (vec)((uvec)words << 16); }
  static vec high(vec words) { return (vec)((uvec)words & 0xffff0000); }
  static void add_one(Sum& sum, const float* row, bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    const vec words = load(row);
    sum.first += wide * low(words);
    sum.second += wide * high(words);
  }
  static void add_two(Sum& sum, const float* row, const float* next, const bfloat16* values) {
    add_one(sum, row, values[0]);
    add_one(sum, next, values[1]);
  }
  static void put(const Sum& sum, float* out) {
    store(out, sum.first);
    store(out + LANES, sum.second);
  }
  static vec dot(vec sum, vec x, vec dy) {
    return sum + low(x) * low(dy) + high(x) * high(dy);
  }
#endif

  // Rows of a wide slab lie far: they are fetched ahead, while there are columns to read.
  template <int NV>
  static void row(const float* slab, const bfloat16* values, const uint16_t* columns,
                  int64_t count, int64_t readable, float* out) {
    if (FAR && readable >= count + AHEAD)
      sum_row<NV, true>(slab, values, columns, count, out);
    else
      sum_row<NV, false>(slab, values, columns, count, out);
  }

 private:
  static constexpr int64_t AHEAD = 18;

  template <int NV, bool FETCH>
  static void sum_row(const float* slab, const bfloat16* values, const uint16_t* columns,
                      int64_t count, float* out) {
    constexpr int64_t stride = NV * LANES;
    constexpr int CHAINS = NV == 1 ? 2 : 1;
    Sum sum[CHAINS][NV] = {};
    int64_t k = 0;
    const auto add_pair = [&](Sum(&to)[NV], int64_t k) {
      const float *row = slab + columns[k] * stride, *next = slab + columns[k + 1] * stride;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        if constexpr (FETCH)
          for (int64_t i = AHEAD - 2; i < AHEAD; ++i)
            __builtin_prefetch(slab + columns[k + i] * stride + v * LANES);
        add_two(to[v], row + v * LANES, next + v * LANES, values + k);
      }
    };
    for (; k + 2 * CHAINS <= count; k += 2 * CHAINS)
#pragma GCC unroll 2
      for (int i = 0; i < CHAINS; ++i) add_pair(sum[i], k + 2 * i);
    for (; k + 2 <= count; k += 2) add_pair(sum[0], k);
    if (k < count)
      for (int v = 0; v < NV; ++v)
        add_one(sum[0][v], slab + columns[k] * stride + v * LANES, values[k]);
    for (int v = 0; v < NV; ++v) {
      for (int i = 1; i < CHAINS; ++i) {
        sum[0][v].first += sum[i][v].first;
        sum[0][v].second += sum[i][v].second;
      }
      put(sum[0][v], out + v * TOKENS);
    }
  }
};

#ifdef __AVX512BF16__
// Up to eight tokens in bfloat16, 16 bytes. Eight entries are multiplied at a time, in pairs.
struct Eights {
  typedef bfloat16 Value;
  static constexpr int64_t WIDTH = 4, TOKENS = 8;

  static void read(const bfloat16* x, int64_t x_stride, int64_t num_tokens, int64_t num_features,
                   int64_t, float* slab, int64_t stride) {
    for (int64_t i = 0; i < num_features; i += LANES)
      transpose(
          num_tokens, num_features - i,
          [&](int64_t r, int64_t n) { return load(x + r * x_stride + i, n); },
          [&](int64_t c, vec v, int64_t) {
            const auto tokens = __builtin_convertvector((uvec)v >> 16, half_vec);
            std::memcpy(slab + (i + c) * stride, &tokens, 16);
          });
  }

  // `row(i)` is the slab's row of entry i.
  template <typename Row>
  [[gnu::always_inline]] static void add(Row row, __m128i values, __m512& first, __m512& second) {
    const auto every_other = [&](int i) [[gnu::always_inline]] {
      __m512i rows = _mm512_castsi128_si512(row(i));
      rows = _mm512_inserti32x4(rows, row(i + 2), 1);
      rows = _mm512_inserti32x4(rows, row(i + 4), 2);
      return _mm512_inserti32x4(rows, row(i + 6), 3);
    };
    const __m512i even = every_other(0), odd = every_other(1);
    const __m512i places = {0, 0, 1ll << 32 | 1, 1ll << 32 | 1,
                            2ll << 32 | 2, 2ll << 32 | 2, 3ll << 32 | 3, 3ll << 32 | 3};
    const auto pairs =
        (__m512bh)_mm512_permutexvar_epi32(places, _mm512_castsi128_si512(values));
    first = _mm512_dpbf16_ps(first, (__m512bh)_mm512_unpacklo_epi16(even, odd), pairs);
    second = _mm512_dpbf16_ps(second, (__m512bh)_mm512_unpackhi_epi16(even, odd), pairs);
  }

  template <int NV>
  static void row(const float* slab, const bfloat16* values, const uint16_t* columns,
                  int64_t count, int64_t, float* out) {
    const auto load_row = [&](int64_t feature) [[gnu::always_inline]] {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(slab + feature * WIDTH));
    };
    __m512 first = _mm512_setzero_ps(), second = first;
    int64_t k = 0;
    for (; k + 8 <= count; k += 8)
      add([&](int i) [[gnu::always_inline]] { return load_row(columns[k + i]); },
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + k)), first, second);
    const int64_t left = count - k;
    if (left)
      add([&](int i) [[gnu::always_inline]] {
            return i < left ? load_row(columns[k + i]) : _mm_setzero_si128();
          },
          _mm_maskz_loadu_epi16((1 << left) - 1, values + k), first, second);
    const auto halves = [](__m512 v) {
      return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    };
    const __m256 a = halves(first), b = halves(second);
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20),
                                        _mm256_permute2f128_ps(a, b, 0x31)));
  }
};
#else
typedef Floats<8> Eights;
#endif

// For all but few tokens.
template <typename T>
using SlabOf = std::conditional_t<std::is_same_v<T, bfloat16>, Pairs<false>, Floats<LANES>>;
template <typename T>
using WideSlabOf = std::conditional_t<std::is_same_v<T, bfloat16>, Pairs<true>, Floats<LANES>>;
// For few, but not for one.
template <typename T>
using FewSlabOf = std::conditional_t<std::is_same_v<T, bfloat16>, Eights, Floats<8>>;

}  // namespace
