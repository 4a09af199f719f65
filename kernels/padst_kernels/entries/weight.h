// A condensed weight, and its values in the order and type that a kernel wants.
//
// Shape letters: T tokens, I and O features in and out, N rows, S entries.

#pragma once

#include <atomic>
#include <type_traits>

#include "simd.h"

namespace {

constexpr int64_t BLOCK = 64;               // rows between which values are staged, y is written
constexpr int64_t PARALLEL_FROM = 1 << 17;  // multiplications below which threads do not pay
constexpr int64_t CHECKED = 1 << 14;        // columns that a thread looks at together
constexpr int64_t AHEAD = 256;              // entries whose values are on their way from memory

enum Scratch { INPUT, OUTPUT, VALUES, SUMS };

// Row r owns the entries from pointer[r] to pointer[r + 1] and is feature rows[r] of y (r where
// rows is null). Entry k has input columns[k], and its value stands at order[k] (k where null).
struct Weight {
  const int32_t* pointer;
  const uint16_t* columns;
  const int32_t *order, *rows;
  int64_t num_tokens, in_features, out_features, num_rows, num_entries;
  mutable std::atomic<bool> legal{true};

  bool threads_pay() const { return num_tokens * num_entries > PARALLEL_FROM; }
  int64_t feature(int64_t row) const { return rows ? rows[row] : row; }
  // The first row whose feature is not below this one.
  int64_t row_from(int64_t feature) const {
    return rows ? std::lower_bound(rows, rows + num_rows, feature) - rows : feature;
  }
  int64_t used_entries() const { return pointer[num_rows]; }

  // Pointers and rows are looked at first; an order when it is used, by `place`.
  bool check_rows() const {
    // Without a branch, for vectors of rows.
    int32_t outside = pointer[0] != 0 || pointer[num_rows] > num_entries;
    for (int64_t r = 0; r < num_rows; ++r) outside |= pointer[r] > pointer[r + 1];
    if (rows && num_rows) {
      outside |= rows[0] < 0 || rows[num_rows - 1] >= out_features;
      for (int64_t r = 1; r < num_rows; ++r) outside |= rows[r - 1] >= rows[r];
    }
    return !outside;
  }
  bool columns_exist(int64_t begin, int64_t end) const {
    uint16_t highest = 0;
    for (int64_t k = begin; k < end; ++k) highest = std::max(highest, columns[k]);
    return highest < in_features || begin == end;
  }
  bool check_columns() const {
    bool exist = true;
#pragma omp parallel for reduction(&& : exist) if (threads_pay())
    for (int64_t k = 0; k < num_entries; k += CHECKED)
      exist = exist && columns_exist(k, std::min(k + CHECKED, num_entries));
    return exist;
  }
  // Where the value of an entry stands, forced into range.
  int64_t place(int64_t entry, uint32_t& highest) const {
    const uint32_t place = order[entry];
    highest = std::max(highest, place);
    return std::min<int64_t>(place, num_entries - 1);
  }
  void check_places(uint32_t highest) const {
    if (highest >= num_entries) legal = false;
  }
};

inline float widen(float value) { return value; }
inline float widen(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
inline float widen(float16 value) { return load(&value, 1)[0]; }

inline void narrow(float value, float* out) { *out = value; }
inline void narrow(float value, float16* out) { store(out, splat(value), 1); }
inline void narrow(float value, bfloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  out->bits = value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Values of the entries from `begin` to `end`; LANES more can be read.
template <typename Value, typename T>
const Value* staged(const Weight& weight, const T* values, int64_t begin, int64_t end) {
  constexpr bool same = std::is_same_v<T, Value>;
  if constexpr (same)
    if (!weight.order) return values + begin;
  auto* out = reinterpret_cast<Value*>(scratch(VALUES, end - begin + LANES));
  if (!weight.order) {
    if constexpr (!same) convert(values + begin, out, end - begin);
    return out;
  }
  uint32_t highest = 0;
  for (int64_t k = begin; k < end; ++k) {
    __builtin_prefetch(values + weight.order[std::min(k + AHEAD, weight.num_entries - 1)]);
    const T value = values[weight.place(k, highest)];
    if constexpr (same)
      out[k - begin] = value;
    else
      out[k - begin] = widen(value);
  }
  weight.check_places(highest);
  return out;
}

// Fetches rows of a matrix, `per_part` of them for each part, so that all `num_rows` come while the
// parts of something else are computed.
template <bool WRITE, typename T>
inline void fetch(const T* matrix, int64_t stride, int64_t num_rows, int64_t num_columns,
                  int64_t part, int64_t per_part) {
  for (int64_t r = part * per_part; r < std::min((part + 1) * per_part, num_rows); ++r)
    for (int64_t c = 0; c < num_columns; c += 64 / sizeof(T))
      __builtin_prefetch(matrix + r * stride + c, WRITE, 2);
}
// Fetches what stands `FAR` places after what is read now.
template <typename T>
inline void fetch_far(const T* now, int64_t count) {
  constexpr int64_t FAR = 1024;
  for (int64_t k = 0; k < count; k += 64 / sizeof(T)) __builtin_prefetch(now + k + FAR);
}

}  // namespace
