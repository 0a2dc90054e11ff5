// Tensors as the kernels see them: addresses, strides and element types.
#pragma once

#include <cstdint>

namespace kdfast {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
    default:
      return 2;
  }
}

// Rows of contiguous elements under two leading dimensions of any stride (in elements).
struct Matrix {
  char* data;
  int64_t outer_stride;
  int64_t inner_stride;
  DType dtype;

  char* row(int64_t outer, int64_t inner) const {
    return data + (outer * outer_stride + inner * inner_stride) * size_of(dtype);
  }
};

// One value per row, or a single value for all of them (step 0).
template <class T>
struct PerRow {
  const T* data;
  int64_t step;

  T at(int64_t row, T otherwise) const { return data ? data[row * step] : otherwise; }
};

}  // namespace kdfast
