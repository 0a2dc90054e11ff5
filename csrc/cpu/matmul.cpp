#include "matmul.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "pages.h"
#include "products.h"
#include "simd.h"

namespace kdfast {
namespace {

// What a thread packs: a block of `right` that fills half of L2 and, beside it, one of `left`.
constexpr int64_t kDepth = 512;
constexpr int64_t kBlockColumns = 256;
constexpr int64_t kBlockRows = 128;
// Rows of `out` that are in L3 while the depth is run through, where it takes more than one block.
constexpr int64_t kSpan = 1024;

constexpr int64_t kPanel = kTileColumns<float>;
// Elements that a transposition reads along the depth: a cache line of each of a panel's columns.
constexpr int64_t kStep = 16;

int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<float*>(::operator new(size * sizeof(float), kAlignment))) {}
  float* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(float* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<float, Delete> data_;
};

template <class T>
KDFAST_CLONES void pack_line(const T* in, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = to_real(in[i]);
}

// Lines of elements that are `step` apart.
template <class T>
void pack_lines(const T* in, int64_t stride, int64_t step, int64_t lines, int64_t n, float* out,
                int64_t out_stride) {
  for (int64_t line = 0; line < lines; ++line, in += stride, out += out_stride) {
    if (step == 1)
      pack_line(in, n, out);
    else
      for (int64_t i = 0; i < n; ++i) out[i] = to_real(in[i * step]);
  }
}

// Columns side by side in memory, one panel after the other: (depth, kPanel) each.
template <class T>
KDFAST_CLONES void pack_panels(const T* in, int64_t row_stride, int64_t depth, int64_t columns,
                               float* out) {
  for (int64_t k = 0; k < depth; ++k) {
    const T* row = in + k * row_stride;
    float* to = out + k * kPanel;
    int64_t column = 0;
    for (; column + kPanel <= columns; column += kPanel, to += depth * kPanel) {
#pragma omp simd
      for (int64_t i = 0; i < kPanel; ++i) to[i] = to_real(row[column + i]);
    }
    for (int64_t i = 0; i < kPanel && column < columns; ++i)
      to[i] = column + i < columns ? to_real(row[column + i]) : 0.f;
  }
}

// The same of columns that are not side by side.
template <class T>
KDFAST_CLONES void pack_transposed(const T* in, int64_t row_stride, int64_t column_stride,
                                   int64_t depth, int64_t columns, float* out) {
  for (int64_t column = 0; column < columns; column += kPanel, out += depth * kPanel) {
    const int64_t n = std::min(kPanel, columns - column);
    if (n < kPanel) std::fill(out, out + depth * kPanel, 0.f);
    for (int64_t begin = 0; begin < depth; begin += kStep) {
      const int64_t end = std::min(begin + kStep, depth);
      for (int64_t i = 0; i < n; ++i) {
        const T* from = in + (column + i) * column_stride;
        for (int64_t k = begin; k < end; ++k) out[k * kPanel + i] = to_real(from[k * row_stride]);
      }
    }
  }
}

template <class Function>
void with_typed(const Factor& factor, int64_t row, int64_t column, Function function) {
  const int64_t at = row * factor.row_stride + column * factor.column_stride;
  const char* data = factor.data + at * size_of(factor.dtype);
  switch (factor.dtype) {
    case DType::kBFloat16:
      return function(reinterpret_cast<const bfloat16*>(data));
    case DType::kFloat16:
      return function(reinterpret_cast<const float16*>(data));
    default:
      return function(reinterpret_cast<const float*>(data));
  }
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Part `index` of `parts`, at a multiple of `step`.
Range part_of(int64_t size, int64_t step, int64_t parts, int64_t index) {
  const int64_t steps = (size + step - 1) / step;
  return {std::min(size, steps * index / parts * step),
          std::min(size, steps * (index + 1) / parts * step)};
}

// One thread's rectangle.
class Rectangle {
 public:
  Rectangle(const MatMul& call, Range rows, Range columns)
      : call_(call),
        rows_(rows),
        columns_(columns),
        depth_(even_part(call.depth)),
        left_rows_(rounded_up(std::min(kBlockRows, rows.size()), kSlackRows)),
        left_((left_rows_ + kPad) * (depth_ + kPad)),
        right_(rounded_up(std::min(kBlockColumns, columns.size()), kPanel) * depth_),
        edge_(left_rows_ * kPanel) {}

  void run() {
    for (int64_t span = rows_.begin; span < rows_.end; span += kSpan) {
      const int64_t span_end = std::min(span + kSpan, rows_.end);
      for (int64_t column = columns_.begin; column < columns_.end; column += kBlockColumns) {
        const int64_t columns = std::min(kBlockColumns, columns_.end - column);
        // Once where there is no depth, which is a product of zeros.
        for (int64_t begin = 0; begin == 0 || begin < call_.depth; begin += depth_) {
          const int64_t depth = std::min(depth_, call_.depth - begin);
          pack_right(begin, depth, column, columns);
          for (int64_t row = span; row < span_end; row += kBlockRows)
            block({row, std::min(row + kBlockRows, span_end)}, column, columns, begin, depth);
        }
      }
    }
  }

 private:
  // Rows a power of two apart would all fall into one set of a cache.
  static constexpr int64_t kPad = 16;

  // The depth in blocks of about one size: the last of them is no rest that is all packing.
  static int64_t even_part(int64_t depth) {
    const int64_t blocks = std::max<int64_t>(1, (depth + kDepth - 1) / kDepth);
    return std::max<int64_t>(1, (depth + blocks - 1) / blocks);
  }

  void pack_right(int64_t begin, int64_t depth, int64_t column, int64_t columns) {
    const Factor& right = call_.right;
    with_typed(right, begin, column, [&](const auto* in) {
      if (right.column_stride == 1)
        pack_panels(in, right.row_stride, depth, columns, right_.get());
      else
        pack_transposed(in, right.row_stride, right.column_stride, depth, columns, right_.get());
    });
  }

  void block(Range rows, int64_t column, int64_t columns, int64_t begin, int64_t depth) {
    Product<float> product{};
    product.depth = depth;
    product.add = call_.add || begin > 0;
    product.left = left_.get();
    // `left` is packed along what stands side by side in it: its elements are taken one by one.
    const Factor& left = call_.left;
    with_typed(left, rows.begin, begin, [&](const auto* in) {
      if (left.column_stride == 1) {
        product.left_row = depth_ + kPad;
        product.left_depth = 1;
        pack_lines(in, left.row_stride, 1, rows.size(), depth, left_.get(), product.left_row);
      } else {
        product.left_row = 1;
        product.left_depth = left_rows_ + kPad;
        pack_lines(in, left.column_stride, left.row_stride, depth, rows.size(), left_.get(),
                   product.left_depth);
      }
    });
    const int64_t even = rows.size() / kSlackRows * kSlackRows;
    for (int64_t panel = 0; panel < columns; panel += kPanel) {
      product.right = right_.get() + panel * depth;
      product.right_depth = kPanel;
      const int64_t n = std::min(kPanel, columns - panel);
      float* out = call_.out + rows.begin * call_.out_row + column + panel;
      product.columns = kPanel;
      product.rows = n == kPanel ? even : 0;
      product.out = out;
      product.out_row = call_.out_row;
      if (product.rows) multiply(product);
      if (product.rows < rows.size()) edge(product, {product.rows, rows.size()}, n);
    }
  }

  // Tiles that do not end where `out` ends.
  void edge(Product<float> product, Range rows, int64_t columns) {
    float* out = product.out + rows.begin * call_.out_row;
    product.left += rows.begin * product.left_row;
    product.rows = rows.size();
    product.out = edge_.get();
    product.out_row = kPanel;
    if (product.add)
      for (int64_t row = 0; row < rows.size(); ++row)
        std::memcpy(edge_.get() + row * kPanel, out + row * call_.out_row, columns * sizeof(float));
    multiply(product);
    for (int64_t row = 0; row < rows.size(); ++row)
      std::memcpy(out + row * call_.out_row, edge_.get() + row * kPanel, columns * sizeof(float));
  }

  const MatMul& call_;
  const Range rows_, columns_;
  const int64_t depth_;
  const int64_t left_rows_;
  const Buffer left_, right_, edge_;
};

}  // namespace

void matmul(const MatMul& call) {
  if (call.rows == 0 || call.columns == 0) return;
  // Each of a thread's rows and columns is packed by it: as few of both as can be.
  int64_t across = 1;
  const auto packed = [&](int64_t n) { return call.rows / (call.threads / n) + call.columns / n; };
  for (int64_t n = 2; n <= call.threads; ++n)
    if (call.threads % n == 0 && packed(n) < packed(across)) across = n;
  const int64_t down = call.threads / across;
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t part = 0; part < across * down; ++part) {
    const Range rows = part_of(call.rows, kSlackRows, down, part / across);
    const Range columns = part_of(call.columns, kPanel, across, part % across);
    if (rows.size() > 0 && columns.size() > 0) Rectangle(call, rows, columns).run();
  }
}

bool has_unused_vectors() {
#ifdef KDFAST_TARGET
  return __builtin_cpu_supports("avx512f") && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace kdfast
