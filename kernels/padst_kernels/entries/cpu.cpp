// Condensed weights on a CPU: every row has inputs of its own, a value and a column for each.
//
// Rows of slabs of tokens, transposed, are read by index (slabs.h). Every sum has one fixed order,
// whatever the number of threads. Shape letters: T tokens, I and O features in and out, N rows,
// S entries.

#include "gradient.h"
#include "product.h"

// Everything is dense and row-major; order and rows may be null. sizes: T, I, O, N, S, with N = O
// in the last two. The result is false where an index is out of range; the output then holds
// anything.
#define PADST_FAN_IN(T)                                                                           \
  extern "C" bool padst_entries_##T(const T* x, const T* values, const int32_t* pointer,           \
                                   const uint16_t* columns, const int32_t* order,                 \
                                   const int32_t* rows, const int64_t* n, T* y) {                 \
    const Weight weight{pointer, columns, order, rows, n[0], n[1], n[2], n[3], n[4]};             \
    return product(weight, x, values, y);                                                         \
  }                                                                                               \
  extern "C" bool padst_entries_dx_##T(const T* dy, const T* values, const int32_t* row_pointer,   \
                                      const uint16_t* columns, const int32_t* order,              \
                                      const int32_t* column_pointer, const uint16_t* rows,        \
                                      const int32_t* slots, const int64_t* n, T* dx) {            \
    const Weight weight{row_pointer, columns, order, nullptr, n[0], n[1], n[2], n[2], n[4]};      \
    const Weight transposed{column_pointer, rows, slots, nullptr, n[0], n[2], n[1], n[1], n[4]};  \
    return input_gradient(weight, transposed, dy, values, dx);                                    \
  }                                                                                               \
  extern "C" bool padst_entries_dvalues_##T(const T* x, const T* dy, const int32_t* pointer,       \
                                           const uint16_t* columns, const int32_t* order,         \
                                           const int64_t* n, T* dvalues) {                        \
    const Weight weight{pointer, columns, order, nullptr, n[0], n[1], n[2], n[2], n[4]};          \
    return values_gradient(weight, x, dy, dvalues);                                               \
  }

PADST_FAN_IN(float)
PADST_FAN_IN(bfloat16)
PADST_FAN_IN(float16)
