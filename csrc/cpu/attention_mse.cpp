#include "attention_mse.h"

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "pages.h"
#include "products.h"
#include "softmax.h"

namespace kdfast {
namespace {

// Tokens at a time, and the size of a tile of E: its rows, the tile and their product stay in L2.
constexpr int64_t kTokens = 128;
// With a causal mask the tiles on the diagonal are work besides.
constexpr int64_t kCausalTokens = 64;
// float32 adds up the Gram matrix of this many tokens, and float64 the rest.
constexpr int64_t kSpan = 1024;

// Rows of one matrix into those of another, times a factor. A head's rows are short: it is a loop
// over them that is compiled for each processor.
template <class T, class Real>
KDFAST_CLONES void load_rows(const T* in, int64_t in_step, int64_t rows, int64_t width, Real factor,
                             Real* out, int64_t out_step) {
  for (int64_t row = 0; row < rows; ++row, in += in_step, out += out_step) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[i] = factor * static_cast<Real>(to_real(in[i]));
  }
}

template <class T, class Real>
KDFAST_CLONES void store_rows(const Real* in, int64_t in_step, int64_t rows, int64_t width,
                              Real factor, T* out, int64_t out_step) {
  // What half precision is rounded from.
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  for (int64_t row = 0; row < rows; ++row, in += in_step, out += out_step) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) from_real(static_cast<Wide>(factor * in[i]), out[i]);
  }
}

// left − right, in the place of one of the two.
template <class Real>
KDFAST_CLONES void subtract_rows(const Real* left, const Real* right, int64_t step, int64_t rows,
                                 int64_t width, Real* out) {
  for (int64_t row = 0; row < rows; ++row, left += step, right += step, out += step) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[i] = left[i] - right[i];
  }
}

template <class Real>
KDFAST_CLONES Real sum_of_squares(const Real* x, int64_t n) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

// Calls `function` with an array of elements, whatever the precision is that is computed in: near
// convergence that of the inputs is not enough.
template <class Function>
void with_any_elements(char* data, DType dtype, Function function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(reinterpret_cast<float*>(data));
    case DType::kFloat64:
      return function(reinterpret_cast<double*>(data));
    case DType::kBFloat16:
      return function(reinterpret_cast<bfloat16*>(data));
    case DType::kFloat16:
      return function(reinterpret_cast<float16*>(data));
  }
}

template <class Real>
KDFAST_CLONES void add(double sign, const Real* x, int64_t n, double* sum) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += sign * x[i];
}

template <class Real>
KDFAST_CLONES double dot(const Real* x, const double* y, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// What E is made of, per token: Q = [Q_s − ρ Q_t, ρ Q_t] and K = [K_s, K_s − K_t], so that E = Q Kᵀ
// and a student that is close to its teacher has small parts, where both heads have one size; and
// Q = [Q_s, −ρ Q_t], K = [K_s, K_t] otherwise. For Eᵀ Q_s, the first Q has Q_s beside it: where the
// student is smaller than its teacher, the sum of Q's parts cancels.
template <class Real>
class Task {
 public:
  explicit Task(const AttentionMse<Real>& call)
      : call_(call),
        student_(call.student_width),
        width_(call.student_width + call.teacher_width),
        differences_(call.student_width == call.teacher_width),
        need_query_(call.query_gradient.data),
        need_key_(call.key_gradient.data),
        query_width_(width_ + (differences_ && need_key_ ? student_ : 0)),
        stride_(row_stride<Real>(query_width_)),
        student_stride_(row_stride<Real>(student_)),
        block_(std::min(call.tokens, call.causal && !call.tiled ? kCausalTokens : kTokens)),
        block_stride_(row_stride<Real>(block_)),
        blocks_((call.tokens + block_ - 1) / block_) {
    const int64_t heads = call.student_query.heads;
    const int64_t of_student = heads / call.student_key.heads;
    group_ = std::gcd(of_student, heads / call.teacher_key.heads);
    matrices_ = of_student / group_;
    const bool tiles = call.tiled || call.causal;
    // Where a key's gradient has one term, it is written as it comes.
    key_sums_are_whole_ = call.tiled || matrices_ > 1;
    const int64_t key_sums = (key_sums_are_whole_ ? call.tokens : block_) + kSlackRows;
    queries_.resize((block_ + kSlackRows) * stride_);
    keys_.resize(((call.tiled ? blocks_ * block_ : block_) + kSlackRows) * stride_);
    if (need_query_) query_sums_.resize((block_ + kSlackRows) * student_stride_);
    if (need_key_) key_sums_.resize(key_sums * student_stride_);
    if (tiles) {
      scores_.resize((block_ + kSlackRows) * block_stride_);
      transposed_.resize((call.tiled ? blocks_ : 1) * width_ * block_stride_);
    }
    if (!call.tiled) {
      part_.resize((width_ + kSlackRows) * stride_);
      query_gram_.resize(width_ * stride_);
      key_gram_.resize(width_ * stride_);
      by_query_.resize(width_ * student_stride_);
      by_key_.resize(width_ * student_stride_);
    }
  }

  // One of the student's key heads in one sample. Adds to sums[0] and sums[1].
  void run(int64_t sample, int64_t key_head, double* sums) {
    sample_ = sample;
    sums_ = sums;
    if (key_sums_are_whole_ && need_key_) std::fill(key_sums_.begin(), key_sums_.end(), Real(0));
    for (int64_t matrix = 0; matrix < matrices_; ++matrix) {
      const int64_t heads = call_.student_query.heads;
      first_head_ = (key_head * matrices_ + matrix) * group_;
      student_key_ = key_head;
      teacher_key_ = first_head_ / (heads / call_.teacher_key.heads);
      if (call_.tiled)
        tiled();
      else if (call_.causal)
        causal_gram();
      else
        gram();
    }
    if (key_sums_are_whole_ && need_key_)
      for (int64_t block = 0; block < blocks_; ++block) write_key(block, key_sums(block));
  }

 private:
  int64_t begin(int64_t block) const { return block * block_; }
  int64_t count(int64_t block) const { return std::min(block_, call_.tokens - begin(block)); }

  void load(const Heads& tensor, int64_t head, int64_t block, int64_t width, Real factor,
            Real* out) {
    with_any_elements(tensor.row(sample_, head, begin(block)), tensor.dtype, [&](const auto* in) {
      load_rows(in, tensor.token_stride, count(block), width, factor, out, stride_);
    });
  }

  // What does not count may be NaN.
  void clear_masked(const bool* mask, int64_t block, int64_t width, Real* rows) {
    if (!mask) return;
    const bool* counts = mask + sample_ * call_.tokens + begin(block);
    for (int64_t i = 0; i < count(block); ++i)
      if (!counts[i]) std::fill_n(rows + i * stride_, width, Real(0));
  }

  void load_queries(int64_t head, int64_t block) {
    Real* rows = queries_.data();
    const Real ratio = differences_ ? call_.ratio : -call_.ratio;
    load(call_.student_query, head, block, student_, Real(1), rows);
    load(call_.teacher_query, head, block, call_.teacher_width, ratio, rows + student_);
    if (differences_) subtract_rows(rows, rows + student_, stride_, count(block), student_, rows);
    if (query_width_ > width_)
      load(call_.student_query, head, block, student_, Real(1), rows + width_);
    clear_masked(call_.query_mask, block, query_width_, rows);
  }

  void load_keys(int64_t block, Real* rows) {
    load(call_.student_key, student_key_, block, student_, Real(1), rows);
    load(call_.teacher_key, teacher_key_, block, call_.teacher_width, Real(1), rows + student_);
    if (differences_)
      subtract_rows(rows, rows + student_, stride_, count(block), student_, rows + student_);
    clear_masked(call_.key_mask, block, width_, rows);
  }

  // Kᵀ, channels by tokens: the factor of Q in E.
  void transpose_keys(int64_t block, const Real* keys, Real* out) {
    constexpr int64_t kEdge = 64 / sizeof(Real);
    const int64_t rows = count(block);
    for (int64_t channel = 0; channel < width_; channel += kEdge) {
      const int64_t end = std::min(channel + kEdge, width_);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = channel; c < end; ++c) out[c * block_stride_ + i] = keys[i * stride_ + c];
    }
  }

  // Where Q_s stands in the rows of Q, and Qᵀ Q_s in their Gram matrix.
  int64_t student_queries() const { return differences_ ? width_ : 0; }

  Real* key_sums(int64_t block) {
    return key_sums_.data() + (key_sums_are_whole_ ? begin(block) * student_stride_ : 0);
  }

  void write(const Heads& gradient, int64_t head, int64_t block, const Real* sums) {
    const Real factor = call_.factor.at(sample_, Real(1));
    with_any_elements(gradient.row(sample_, head, begin(block)), gradient.dtype, [&](auto* out) {
      store_rows(sums, student_stride_, count(block), student_, factor, out, gradient.token_stride);
    });
  }

  void write_query(int64_t head, int64_t block) {
    write(call_.query_gradient, head, block, query_sums_.data());
  }

  void write_key(int64_t block, const Real* sums) {
    write(call_.key_gradient, student_key_, block, sums);
  }

  // Q_i K_jᵀ, without what a causal mask leaves out, and its squares.
  void form_scores(int64_t queries, int64_t keys, const Real* transposed, bool diagonal) {
    multiply(Product<Real>{queries, keys, width_, queries_.data(), stride_, 1, transposed,
                           block_stride_, scores_.data(), block_stride_});
    double sum = 0;
    for (int64_t i = 0; i < queries; ++i) {
      Real* scores = scores_.data() + i * block_stride_;
      const int64_t seen = diagonal ? std::min(i + 1, keys) : keys;
      sum += sum_of_squares(scores, seen);
      std::fill(scores + seen, scores + keys, Real(0));
    }
    sums_[0] += sum;
    sums_[1] += sum;
  }

  void add_scores_times_keys(int64_t queries, int64_t keys, const Real* rows, bool add) {
    multiply(Product<Real>{queries, student_, keys, scores_.data(), block_stride_, 1, rows, stride_,
                           query_sums_.data(), student_stride_, add});
  }

  void add_scores_times_queries(int64_t queries, int64_t keys, Real* sums, bool add) {
    multiply(Product<Real>{keys, student_, queries, scores_.data(), 1, block_stride_,
                           queries_.data() + student_queries(), stride_, sums, student_stride_,
                           add});
  }

  void tiled() {
    for (int64_t block = 0; block < blocks_; ++block) {
      Real* keys = keys_.data() + begin(block) * stride_;
      load_keys(block, keys);
      transpose_keys(block, keys, transposed_.data() + block * width_ * block_stride_);
    }
    for (int64_t head = first_head_; head < first_head_ + group_; ++head) {
      for (int64_t i = 0; i < blocks_; ++i) {
        load_queries(head, i);
        const int64_t seen = call_.causal ? i + 1 : blocks_;
        for (int64_t j = 0; j < seen; ++j) {
          form_scores(count(i), count(j), transposed_.data() + j * width_ * block_stride_,
                      call_.causal && i == j);
          const Real* keys = keys_.data() + begin(j) * stride_;
          if (need_query_) add_scores_times_keys(count(i), count(j), keys, j > 0);
          if (need_key_) add_scores_times_queries(count(i), count(j), key_sums(j), true);
        }
        if (need_query_) write_query(head, i);
      }
    }
  }

  // part_ = rowsᵀ rows, or part_ += rowsᵀ rows; the upper tiles of it. `columns` are width_, or
  // query_width_ for the product with what stands beside Q besides.
  void add_gram(int64_t count, const Real* rows, int64_t columns, bool add) {
    multiply(Product<Real>{width_, columns, count, rows, 1, stride_, rows, stride_, part_.data(),
                           stride_, add, true});
  }

  // Adds `part_` to a Gram matrix, or takes it away again.
  void add_part(double sign, int64_t columns, std::vector<double>& gram) {
    for (int64_t i = 0; i < width_; ++i) {
      const int64_t at = i * stride_ + i;
      add(sign, part_.data() + at, columns - i, gram.data() + at);
    }
  }

  // Adds the Gram matrix of all blocks' rows, which `load` puts into `rows` one block at a time.
  template <class Load>
  void sum_gram(const std::vector<Real>& rows, int64_t columns, std::vector<double>& gram,
                Load load) {
    for (int64_t block = 0; block < blocks_; ++block) {
      load(block);
      add_gram(count(block), rows.data(), columns, begin(block) % kSpan != 0);
      if (block + 1 == blocks_ || begin(block + 1) % kSpan == 0) add_part(1, columns, gram);
    }
  }

  // Adds ⟨QᵀQ, KᵀK⟩, and what of it is no product of the two models. Both are symmetric.
  template <class Number>
  void add_inner(const std::vector<Number>& query_gram, const std::vector<double>& key_gram) {
    double all = 0, own = 0;
    for (int64_t i = 0; i < width_; ++i) {
      const int64_t at = i * stride_;
      const auto upto = [&](int64_t first, int64_t last) {
        return dot(query_gram.data() + at + first, key_gram.data() + at + first, last - first);
      };
      const double diagonal = query_gram[at + i] * key_gram[at + i];
      const int64_t split = i < student_ ? student_ : width_;
      const double same = diagonal + 2 * upto(i + 1, split);
      own += same;
      all += same + 2 * upto(split, width_);
    }
    sums_[0] += all;
    sums_[1] += own;
  }

  // Some columns of a Gram matrix from both its triangles, as a factor: Kᵀ K_s, from the first on,
  // is what Q is multiplied with for E K_s, and Qᵀ Q_s is what K is for Eᵀ Q_s.
  void factor_of(const std::vector<double>& gram, int64_t first, Real* out) const {
    for (int64_t i = 0; i < width_; ++i)
      for (int64_t j = first; j < first + student_; ++j)
        out[i * student_stride_ + j - first] =
            Real(i <= j ? gram[i * stride_ + j] : gram[j * stride_ + i]);
  }

  void multiply_rows(int64_t count, const Real* rows, const std::vector<Real>& factor, Real* sums,
                     bool add) {
    multiply(Product<Real>{count, student_, width_, rows, stride_, 1, factor.data(),
                           student_stride_, sums, student_stride_, add});
  }

  void gram() {
    std::fill(query_gram_.begin(), query_gram_.end(), 0.0);
    std::fill(key_gram_.begin(), key_gram_.end(), 0.0);
    sum_gram(keys_, width_, key_gram_, [&](int64_t block) { load_keys(block, keys_.data()); });
    for (int64_t head = first_head_; head < first_head_ + group_; ++head)
      sum_gram(queries_, query_width_, query_gram_,
               [&](int64_t block) { load_queries(head, block); });
    add_inner(query_gram_, key_gram_);

    // Backwards: the last rows are still there.
    if (need_query_) {
      factor_of(key_gram_, 0, by_query_.data());
      const int64_t last_head = first_head_ + group_ - 1;
      for (int64_t head = last_head; head >= first_head_; --head)
        for (int64_t block = blocks_ - 1; block >= 0; --block) {
          if (head < last_head || block + 1 < blocks_) load_queries(head, block);
          multiply_rows(count(block), queries_.data(), by_query_, query_sums_.data(), false);
          write_query(head, block);
        }
    }
    if (need_key_) {
      factor_of(query_gram_, student_queries(), by_key_.data());
      for (int64_t block = blocks_ - 1; block >= 0; --block) {
        if (block + 1 < blocks_) load_keys(block, keys_.data());
        multiply_rows(count(block), keys_.data(), by_key_, key_sums(block), key_sums_are_whole_);
        if (!key_sums_are_whole_) write_key(block, key_sums(block));
      }
    }
  }

  // The same where each query sees the keys up to its own: the Gram matrix of the keys before its
  // block, and for a key that of the queries behind its block, which is all of them without those
  // up to it. Within a block scores are formed.
  void causal_gram() {
    std::vector<double>&past = key_gram_, &future = query_gram_;
    std::fill(past.begin(), past.end(), 0.0);
    std::fill(future.begin(), future.end(), 0.0);
    for (int64_t block = 0; need_key_ && block < blocks_; ++block) {
      for (int64_t head = first_head_; head < first_head_ + group_; ++head) {
        load_queries(head, block);
        add_gram(count(block), queries_.data(), query_width_, head > first_head_);
      }
      add_part(1, query_width_, future);
    }
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t tokens = count(block);
      load_keys(block, keys_.data());
      transpose_keys(block, keys_.data(), transposed_.data());
      if (need_query_ && block > 0) factor_of(past, 0, by_query_.data());
      bool add = key_sums_are_whole_;
      for (int64_t head = first_head_; head < first_head_ + group_; ++head) {
        load_queries(head, block);
        form_scores(tokens, tokens, transposed_.data(), true);
        if (need_query_) {
          add_scores_times_keys(tokens, tokens, keys_.data(), false);
          if (block > 0)
            multiply_rows(tokens, queries_.data(), by_query_, query_sums_.data(), true);
          write_query(head, block);
        }
        if (need_key_) add_scores_times_queries(tokens, tokens, key_sums(block), add);
        add = true;
        add_gram(tokens, queries_.data(), query_width_, head > first_head_);
      }
      add_inner(part_, past);
      if (need_key_) {
        add_part(-1, query_width_, future);
        factor_of(future, student_queries(), by_key_.data());
        multiply_rows(tokens, keys_.data(), by_key_, key_sums(block), true);
        if (!key_sums_are_whole_) write_key(block, key_sums(block));
      }
      add_gram(tokens, keys_.data(), width_, false);
      add_part(1, width_, past);
    }
  }

  const AttentionMse<Real>& call_;
  const int64_t student_, width_;
  const bool differences_, need_query_, need_key_;
  const int64_t query_width_, stride_, student_stride_;
  const int64_t block_, block_stride_, blocks_;
  int64_t group_, matrices_;
  bool key_sums_are_whole_;
  std::vector<Real> queries_, keys_, transposed_, scores_;
  std::vector<Real> query_sums_, key_sums_, part_, by_query_, by_key_;
  std::vector<double> query_gram_, key_gram_;

  int64_t sample_, first_head_, student_key_, teacher_key_;
  double* sums_;
};

}  // namespace

template <class Real>
void attention_mse(const AttentionMse<Real>& call) {
  const int64_t heads = call.student_key.heads;
  const int64_t tasks = call.samples * heads;
  std::vector<double> sums(2 * tasks, 0.0);
  const int threads = static_cast<int>(std::min<int64_t>(call.threads, tasks));
#pragma omp parallel num_threads(threads)
  {
    Task<Real> mine(call);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task)
      mine.run(task / heads, task % heads, sums.data() + 2 * task);
  }
  for (int64_t sample = 0; sample < call.samples; ++sample)
    for (int64_t i = 0; i < 2; ++i) {
      double sum = 0;
      for (int64_t head = 0; head < heads; ++head) sum += sums[2 * (sample * heads + head) + i];
      call.sums[i * call.samples + sample] = sum;
    }
}

template void attention_mse(const AttentionMse<float>&);
template void attention_mse(const AttentionMse<double>&);

}  // namespace kdfast
