// Grouped gather GEMM in float32 on a CPU, without a gathered copy of x. GCC vector extensions.
//
// Shape letters: T tokens, I and O features in and out, G tiles, K columns and V rows of a tile,
// R row groups. Activations come and leave token-major. A slab of tokens is transposed once, then
// rows of it are read by index straight into register tiles: ROWS rows by up to three vectors of
// tokens. Every sum has one fixed order, whatever the number of threads. Column I reads as zero.

#include <vector>

#include "simd.h"

namespace {

constexpr int ROWS = LANES == 8 ? 4 : 8;    // rows of a register tile
constexpr int64_t SLAB = 3 * LANES;         // tokens of a slab in the forward pass and in dx
constexpr int64_t LONG_SLAB = 12 * LANES;   // tokens of a slab in dw
constexpr int64_t FEW = LANES / 2;          // up to so many tokens, lanes hold weights, not tokens
constexpr int64_t PARALLEL_FROM = 1 << 18;  // multiplications below which threads do not pay

// Which tiles add to each row group, and where the rows of the row groups stand in y.
struct Index {
  const int32_t *columns, *row_pointer, *order;
  int64_t num_tiles, num_groups, width, height, in_features, out_features;
  std::vector<int32_t> positions;  // [O], row of each feature of y; empty when in natural order

  Index(const int32_t* columns, const int32_t* rows, const int32_t* row_pointer,
        const int32_t* order, const int64_t* sizes)
      : columns(columns), row_pointer(row_pointer), order(order), num_tiles(sizes[3]),
        num_groups(sizes[6]), width(sizes[4]), height(sizes[5]), in_features(sizes[1]),
        out_features(sizes[2]) {
    if (!rows) return;
    positions.assign(out_features, -1);
    for (int32_t i = 0; i < num_rows(); ++i)
      if (rows[i] >= 0 && rows[i] < out_features) positions[rows[i]] = i;
  }
  int64_t num_rows() const { return num_groups * height; }
  int64_t begin(int64_t group) const { return row_pointer ? row_pointer[group] : group; }
  int64_t end(int64_t group) const { return begin(group + 1); }
  // Tile of the weight at a place in `columns`.
  int64_t tile(int64_t place) const { return order ? order[place] : place; }
  const int32_t* rows() const { return positions.empty() ? nullptr : positions.data(); }

  bool legal() const {
    bool inside = true;
    for (int64_t i = 0; i < num_tiles * width; ++i)
      inside &= columns[i] >= 0 && columns[i] <= in_features;
    if (row_pointer) inside &= row_pointer[0] == 0 && row_pointer[num_groups] == num_tiles;
    for (int64_t r = 0; row_pointer && r < num_groups; ++r)
      inside &= row_pointer[r] <= row_pointer[r + 1];
    for (int64_t i = 0; order && i < num_tiles; ++i) inside &= order[i] >= 0 && order[i] < num_tiles;
    for (int32_t position : positions) inside &= position >= 0;
    return inside && (positions.size() || out_features <= num_rows());
  }
};

// out[i] = sum over k of weight[k][i] * x[column[k]], for NROWS rows of one row group.
template <int NROWS, int NV>
inline void forward_rows(const Index& index, int64_t group, const float* x, const float* weight,
                         float* out) {
  constexpr int64_t stride = NV * LANES;
  const int64_t width = index.width, height = index.height;
  vec sum[NROWS][NV] = {};
  for (int64_t n = index.begin(group); n < index.end(group); ++n) {
    const float* w = weight + index.tile(n) * width * height;
    const int32_t* column = index.columns + n * width;
    for (int64_t k = 0; k < width; ++k, w += height) {
      const float* row = x + column[k] * stride;
      vec in[NV];
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) in[v] = load(row + v * LANES);
#pragma GCC unroll 8
      for (int i = 0; i < NROWS; ++i) {
        const vec coefficient = splat(w[i]);
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v) sum[i][v] += coefficient * in[v];
      }
    }
  }
  for (int i = 0; i < NROWS; ++i)
    for (int v = 0; v < NV; ++v) store(out + i * stride + v * LANES, sum[i][v]);
}

template <int NV>
void forward_slab(const Index& index, const float* x, const float* weight, float* out) {
  constexpr int64_t stride = NV * LANES;
  for (int64_t r = 0; r < index.num_groups; ++r) {
    int64_t i = 0;
    for (; i + ROWS <= index.height; i += ROWS, out += ROWS * stride)
      forward_rows<ROWS, NV>(index, r, x, weight + i, out);
    for (; i < index.height; ++i, out += stride)
      forward_rows<1, NV>(index, r, x, weight + i, out);
  }
}

// dx[column[i]] += sum over v of weight[i][v] * dy[v], for NROWS columns of one tile.
template <int NROWS, int NV>
inline void dx_rows(const float* dy, const float* weight, const int32_t* column, int64_t height,
                    float* dx) {
  constexpr int64_t stride = NV * LANES;
  vec sum[NROWS][NV] = {};
  for (int64_t j = 0; j < height; ++j, dy += stride) {
    vec in[NV];
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) in[v] = load(dy + v * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < NROWS; ++i) {
      const vec coefficient = splat(weight[i * height + j]);
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) sum[i][v] += coefficient * in[v];
    }
  }
  for (int i = 0; i < NROWS; ++i)
    for (int v = 0; v < NV; ++v) {
      float* out = dx + column[i] * stride + v * LANES;
      store(out, load(out) + sum[i][v]);
    }
}

template <int NV>
void dx_slab(const Index& index, const float* dy, const float* weight, float* dx) {
  constexpr int64_t stride = NV * LANES;
  const int64_t width = index.width, height = index.height;
  for (int64_t r = 0; r < index.num_groups; ++r)
    for (int64_t n = index.begin(r); n < index.end(r); ++n) {
      const float* in = dy + r * height * stride;
      const float* w = weight + index.tile(n) * width * height;
      const int32_t* column = index.columns + n * width;
      int64_t k = 0;
      for (; k + ROWS <= width; k += ROWS)
        dx_rows<ROWS, NV>(in, w + k * height, column + k, height, dx);
      for (; k < width; ++k) dx_rows<1, NV>(in, w + k * height, column + k, height, dx);
    }
}

// dw[i][0 .. NV * LANES] += sum over tokens of x[column[i]][t] * dy[t][...], for NROWS columns;
// only the first `num_valid` of them exist.
template <int NROWS, int NV>
inline void dw_rows(const float* x, int64_t x_stride, const int32_t* column, const float* dy,
                    int64_t dy_stride, int64_t num_tokens, float* dw, int64_t dw_stride,
                    int64_t num_valid) {
  vec sum[NROWS][NV] = {};
  const float* row[NROWS];
  for (int i = 0; i < NROWS; ++i) row[i] = x + column[i] * x_stride;
  for (int64_t t = 0; t < num_tokens; ++t, dy += dy_stride) {
    vec in[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) in[v] = load(dy + v * LANES);
#pragma GCC unroll 24
    for (int i = 0; i < NROWS; ++i) {
      const vec coefficient = splat(row[i][t]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[i][v] += coefficient * in[v];
    }
  }
  for (int i = 0; i < NROWS; ++i) {
    float* out = dw + i * dw_stride;
    if (num_valid == NV * LANES) {
      for (int v = 0; v < NV; ++v) store(out + v * LANES, load(out + v * LANES) + sum[i][v]);
    } else {
      for (int64_t j = 0; j < num_valid; ++j) out[j] += sum[i][j / LANES][j % LANES];
    }
  }
}

template <int NV>
void dw_tile(const float* x, int64_t x_stride, const int32_t* column, int64_t width,
             const float* dy, int64_t dy_stride, int64_t num_tokens, float* dw, int64_t dw_stride,
             int64_t num_valid) {
  constexpr int COLUMNS = (LANES == 8 ? 12 : 24) / NV;
  int64_t k = 0;
  for (; k + COLUMNS <= width; k += COLUMNS)
    dw_rows<COLUMNS, NV>(x, x_stride, column + k, dy, dy_stride, num_tokens, dw + k * dw_stride,
                         dw_stride, num_valid);
  for (; k + 4 <= width; k += 4)
    dw_rows<4, NV>(x, x_stride, column + k, dy, dy_stride, num_tokens, dw + k * dw_stride,
                   dw_stride, num_valid);
  for (; k < width; ++k)
    dw_rows<1, NV>(x, x_stride, column + k, dy, dy_stride, num_tokens, dw + k * dw_stride,
                   dw_stride, num_valid);
}

// NT tokens of one row group, with NV vectors of rows in the lanes.
template <int NT, int NV>
inline void few_rows(const Index& index, int64_t group, const float* x, const float* weight,
                     float* out) {
  const int64_t width = index.width, height = index.height;
  vec sum[NT][NV] = {};
  for (int64_t n = index.begin(group); n < index.end(group); ++n) {
    const float* w = weight + index.tile(n) * width * height;
    const int32_t* column = index.columns + n * width;
    for (int64_t k = 0; k < width; ++k, w += height)
      for (int t = 0; t < NT; ++t) {
        const vec in = splat(x[t * (index.in_features + 1) + column[k]]);
        for (int v = 0; v < NV; ++v) sum[t][v] += in * load(w + v * LANES);
      }
  }
  for (int t = 0; t < NT; ++t)
    for (int v = 0; v < NV; ++v) store(out + t * index.num_rows() + v * LANES, sum[t][v]);
}

template <int NT>
void few_group(const Index& index, int64_t group, const float* x, const float* weight,
               float* out) {
  const int64_t width = index.width, height = index.height;
  int64_t i = 0;
  for (; i + 4 * LANES <= height; i += 4 * LANES)
    few_rows<NT, 4>(index, group, x, weight + i, out + i);
  for (; i + LANES <= height; i += LANES) few_rows<NT, 1>(index, group, x, weight + i, out + i);
  for (; i < height; ++i)
    for (int t = 0; t < NT; ++t) {
      float sum = 0;
      for (int64_t n = index.begin(group); n < index.end(group); ++n)
        for (int64_t k = 0; k < width; ++k)
          sum += x[t * (index.in_features + 1) + index.columns[n * width + k]] *
                 weight[(index.tile(n) * width + k) * height + i];
      out[t * index.num_rows() + i] = sum;
    }
}

void forward_few(const Index& index, const float* x, const float* weight, float* y,
                 int64_t num_tokens) {
  const int64_t in_features = index.in_features, stride = in_features + 1;
  float* copy = scratch(0, num_tokens * stride);
  for (int64_t t = 0; t < num_tokens; ++t) {
    std::memcpy(copy + t * stride, x + t * in_features, in_features * sizeof(float));
    copy[t * stride + in_features] = 0;
  }
  const bool direct = !index.rows() && index.num_rows() == index.out_features;
  float* rows = direct ? y : scratch(1, num_tokens * index.num_rows());
#pragma omp parallel for schedule(static) \
    if (index.num_tiles * index.width * index.height > PARALLEL_FROM)
  for (int64_t r = 0; r < index.num_groups; ++r) {
    float* out = rows + r * index.height;
    int64_t t = 0;
    for (; t + 4 <= num_tokens; t += 4)
      few_group<4>(index, r, copy + t * stride, weight, out + t * index.num_rows());
    for (; t < num_tokens; ++t)
      few_group<1>(index, r, copy + t * stride, weight, out + t * index.num_rows());
  }
  if (direct) return;
  for (int64_t t = 0; t < num_tokens; ++t)
    for (int64_t o = 0; o < index.out_features; ++o)
      y[t * index.out_features + o] =
          rows[t * index.num_rows() + (index.rows() ? index.rows()[o] : o)];
}

}  // namespace

// Every array is dense and row-major; rows, row_pointer and order may be null. sizes: T, I, O, G,
// K, V, R. The result is false, and nothing is written, where an index is out of range.
extern "C" {

bool padst_gather_gemm(const float* x, const float* weight, const int32_t* columns,
                       const int32_t* rows, const int32_t* row_pointer, const int32_t* order,
                       const int64_t* sizes, float* y) {
  const Index index(columns, rows, row_pointer, order, sizes);
  if (!index.legal()) return false;
  const int64_t num_tokens = sizes[0], in_features = sizes[1], out_features = sizes[2];
  // Rows that fill no lanes go one by one there.
  if (num_tokens == 1 || (num_tokens <= FEW && index.height % LANES == 0)) {
    forward_few(index, x, weight, y, num_tokens);
    return true;
  }
#pragma omp parallel for schedule(static) \
    if (num_tokens * index.num_tiles * index.width * index.height > PARALLEL_FROM)
  for (int64_t start = 0; start < num_tokens; start += SLAB) {
    const int64_t count = std::min(SLAB, num_tokens - start);
    const int64_t vectors = (count + LANES - 1) / LANES, stride = vectors * LANES;
    float* in = scratch(0, (in_features + 1) * stride);
    float* out = scratch(1, index.num_rows() * stride);
    to_features(x + start * in_features, in_features, count, in_features, stride, nullptr, in,
                stride);
    std::memset(in + in_features * stride, 0, stride * sizeof(float));
    auto run = vectors == 3 ? forward_slab<3> : vectors == 2 ? forward_slab<2> : forward_slab<1>;
    run(index, in, weight, out);
    to_tokens(out, stride, count, out_features, index.rows(), y + start * out_features,
              out_features);
  }
  return true;
}

bool padst_gather_gemm_dx(const float* dy, const float* weight, const int32_t* columns,
                          const int32_t* rows, const int32_t* row_pointer, const int32_t* order,
                          const int64_t* sizes, float* dx) {
  const Index index(columns, rows, row_pointer, order, sizes);
  if (!index.legal()) return false;
  const int64_t num_tokens = sizes[0], in_features = sizes[1], out_features = sizes[2];
#pragma omp parallel for schedule(static) \
    if (num_tokens * index.num_tiles * index.width * index.height > PARALLEL_FROM)
  for (int64_t start = 0; start < num_tokens; start += SLAB) {
    const int64_t count = std::min(SLAB, num_tokens - start);
    const int64_t vectors = (count + LANES - 1) / LANES, stride = vectors * LANES;
    float* in = scratch(0, index.num_rows() * stride);
    float* out = scratch(1, (in_features + 1) * stride);
    if (out_features < index.num_rows())
      std::memset(in, 0, index.num_rows() * stride * sizeof(float));
    to_features(dy + start * out_features, out_features, count, out_features, stride, index.rows(),
                in, stride);
    std::memset(out, 0, (in_features + 1) * stride * sizeof(float));
    auto run = vectors == 3 ? dx_slab<3> : vectors == 2 ? dx_slab<2> : dx_slab<1>;
    run(index, in, weight, out);
    to_tokens(out, stride, count, in_features, nullptr, dx + start * in_features, in_features);
  }
  return true;
}

// Adds to dw.
bool padst_gather_gemm_dw(const float* x, const float* dy, const int32_t* columns,
                          const int32_t* rows, const int32_t* row_pointer, const int32_t* order,
                          const int64_t* sizes, float* dw) {
  const Index index(columns, rows, row_pointer, order, sizes);
  if (!index.legal()) return false;
  const int64_t num_tokens = sizes[0], in_features = sizes[1], out_features = sizes[2];
  const int64_t width = index.width, height = index.height, num_rows = index.num_rows();
  // Lanes read past the last row of a tile that is no multiple of them.
  const bool direct = !index.rows() && num_rows == out_features && height % LANES == 0;
  const int64_t longest = std::min(LONG_SLAB, (num_tokens + LANES - 1) / LANES * LANES);
  float* slab = scratch(0, (in_features + 1) * longest);
  float* dy_rows = direct ? nullptr : scratch(1, longest * num_rows + 4 * LANES);
  for (int64_t start = 0; start < num_tokens; start += LONG_SLAB) {
    const int64_t count = std::min(LONG_SLAB, num_tokens - start);
    const int64_t stride = (count + LANES - 1) / LANES * LANES;
#pragma omp parallel if (count * index.num_tiles * width * height > PARALLEL_FROM)
    {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < count; t += LANES) {
        const int64_t part = std::min<int64_t>(LANES, count - t);
        to_features(x + (start + t) * in_features, in_features, part, in_features, LANES, nullptr,
                    slab + t, stride);
        std::memset(slab + in_features * stride + t, 0, LANES * sizeof(float));
        for (int64_t i = t; i < t + part && !direct; ++i) {
          const float* in = dy + (start + i) * out_features;
          float* out = dy_rows + i * num_rows;
          if (out_features < num_rows) std::memset(out, 0, num_rows * sizeof(float));
          if (!index.rows()) std::memcpy(out, in, out_features * sizeof(float));
          for (int64_t o = 0; o < out_features && index.rows(); ++o) out[index.rows()[o]] = in[o];
        }
      }
#pragma omp for schedule(static)
      for (int64_t r = 0; r < index.num_groups; ++r)
        for (int64_t n = index.begin(r); n < index.end(r); ++n) {
          const float* in = (direct ? dy + start * out_features : dy_rows) + r * height;
          float* out = dw + index.tile(n) * width * height;
          for (int64_t v = 0; v < height;) {
            const int64_t left = height - v;
            const int64_t vectors = std::min<int64_t>(4, (left + LANES - 1) / LANES);
            auto run = vectors == 4   ? dw_tile<4>
                       : vectors == 3 ? dw_tile<3>
                       : vectors == 2 ? dw_tile<2>
                                      : dw_tile<1>;
            run(slab, stride, columns + n * width, width, in + v, num_rows, count, out + v, height,
                std::min(left, vectors * LANES));
            v += vectors * LANES;
          }
        }
    }
  }
  return true;
}
}
