// Which columns and rows the tiles of a product stand at.
//
// Shape letters: T tokens, I and O features in and out, G tiles, K columns and V rows of a tile,
// R row groups.

#pragma once

#include <vector>

#include "simd.h"

namespace {

// Multiplications below which threads do not pay.
constexpr int64_t PARALLEL_FROM = 1 << 18;

struct Index {
  const int32_t *columns, *rows, *row_pointer, *order;
  int64_t in_features, out_features, num_tiles, width, height, num_groups;
  std::vector<int32_t> row_of_feature;

  int64_t num_rows() const { return num_groups * height; }
  int64_t begin(int64_t group) const { return row_pointer ? row_pointer[group] : group; }
  int64_t end(int64_t group) const { return begin(group + 1); }
  // Tile of the weight at a place in `columns`.
  int64_t tile(int64_t place) const { return order ? order[place] : place; }
  // Row of each feature of y, null in natural order; feature of y behind a row, O where none is.
  const int32_t* positions() const { return rows ? row_of_feature.data() : nullptr; }
  int32_t feature(int64_t row) const {
    const int64_t feature = rows ? rows[row] : row;
    return feature >= 0 && feature < out_features ? feature : out_features;
  }
  bool threads_pay(int64_t num_tokens) const {
    return num_tokens * num_tiles * width * height > PARALLEL_FROM;
  }

  // Derives the positions. False where an index is out of range or a feature has no row, or two.
  bool complete() {
    int32_t low = 0, high = 0;
    for (int64_t i = 0; i < num_tiles * width; ++i) {
      low = std::min(low, columns[i]);
      high = std::max(high, columns[i]);
    }
    bool legal = low >= 0 && high <= in_features && out_features <= num_rows();
    if (row_pointer) legal &= row_pointer[0] == 0 && row_pointer[num_groups] == num_tiles;
    for (int64_t r = 0; row_pointer && r < num_groups; ++r)
      legal &= row_pointer[r] <= row_pointer[r + 1];
    for (int64_t i = 0; order && i < num_tiles; ++i) legal &= order[i] >= 0 && order[i] < num_tiles;
    if (!rows) return legal;
    row_of_feature.assign(out_features + 1, -1);
    int64_t num_features = 0;
    for (int64_t i = 0; i < num_rows(); ++i) {
      num_features += feature(i) < out_features;
      row_of_feature[feature(i)] = i;
    }
    for (int64_t o = 0; o < out_features; ++o) legal &= row_of_feature[o] >= 0;
    return legal && num_features == out_features;
  }
};

}  // namespace
