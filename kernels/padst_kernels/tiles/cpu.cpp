// Grouped gather GEMM on a CPU, without a gathered copy of x. Activations come and leave
// token-major; every sum has one fixed order, whatever the number of threads.

#include "cpu_few_tokens.h"
#include "cpu_forward.h"
#include "cpu_input_gradient.h"
#include "cpu_pairs.h"
#include "cpu_weight_gradient.h"

namespace {

template <typename T>
struct Types {
  typedef T element;
  typedef Single unit;
};
#ifdef __AVX512BF16__
template <>
struct Types<bfloat16> {
  typedef bfloat16 element;
  typedef Pair unit;
};
#endif

template <typename Run>
void for_type(int64_t type, Run run) {
  if (type == 0) run(Types<float>());
  if (type == 1) run(Types<bfloat16>());
  if (type == 2) run(Types<float16>());
}

}  // namespace

// pass: 0 multiplies x and weight into y, 1 dy and weight into dx, 2 x and dy into dw. type: 0 for
// float32, 1 bfloat16, 2 float16. Every array is dense and row-major; rows, row_pointer and order
// may be null. False, and nothing is written, where an index is out of range.
extern "C" bool padst_tile_matmul(int64_t pass, int64_t type, const void* first,
                                  const void* second, void* out, const int32_t* columns,
                                  const int32_t* rows, const int32_t* row_pointer,
                                  const int32_t* order, int64_t num_tokens, int64_t in_features,
                                  int64_t out_features, int64_t num_tiles, int64_t width,
                                  int64_t height, int64_t num_groups) {
  Index index{columns,   rows,  row_pointer, order,      in_features, out_features,
              num_tiles, width, height,      num_groups, {}};
  if (!index.complete()) return false;
  for_type(type, [&](auto types) {
    typedef typename decltype(types)::element T;
    typedef typename decltype(types)::unit Unit;
    const T *a = static_cast<const T*>(first), *b = static_cast<const T*>(second);
    T* result = static_cast<T*>(out);
    // That pays where rows fill the lanes; beside pairs for half as many tokens.
    if (pass == 0 && (num_tokens == 1 || (num_tokens <= FEW / Unit::PER && height % LANES == 0)))
      forward_few(index, a, b, num_tokens, result);
    else if (pass == 0)
      forward<Unit>(index, a, b, num_tokens, result);
    else if (pass == 1)
      input_gradient<Unit>(index, a, b, num_tokens, result);
    else
      weight_gradient<Unit>(index, a, b, num_tokens, result);
  });
  return true;
}
