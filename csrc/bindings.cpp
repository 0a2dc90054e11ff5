// The module kdfast._C: addresses, sizes and strides in, nothing of torch. Python has checked every
// argument before it comes here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/attention_mse.h"
#include "cpu/hidden.h"
#include "cpu/kd_loss.h"
#include "cpu/linear_topk_kd_loss.h"
#include "cpu/matmul.h"
#include "cpu/pages.h"
#include "cpu/topk_kd_loss.h"
#include "cpu/truncated_softmax.h"
#if defined(KDFAST_CUDA)
#include "cuda/kd_loss.h"
#endif

namespace py = pybind11;

namespace {

using Address = uintptr_t;
using MatrixTuple = std::tuple<Address, int64_t, int64_t, std::string>;
using PerRowTuple = std::tuple<Address, int64_t>;
// Address, strides of samples, heads and tokens, the number of heads, and the dtype.
using HeadsTuple = std::tuple<Address, int64_t, int64_t, int64_t, int64_t, std::string>;

kdfast::DType dtype_of(const std::string& name) {
  static const std::map<std::string, kdfast::DType> dtypes = {
      {"float32", kdfast::DType::kFloat32},
      {"bfloat16", kdfast::DType::kBFloat16},
      {"float16", kdfast::DType::kFloat16},
      {"float64", kdfast::DType::kFloat64},
  };
  return dtypes.at(name);
}

kdfast::Matrix matrix(const MatrixTuple& tuple) {
  const auto& [data, outer_stride, inner_stride, dtype] = tuple;
  return {reinterpret_cast<char*>(data), outer_stride, inner_stride, dtype_of(dtype)};
}

kdfast::Heads heads(const HeadsTuple& tuple) {
  const auto& [data, sample_stride, head_stride, token_stride, count, dtype] = tuple;
  return {reinterpret_cast<char*>(data),
          sample_stride,
          head_stride,
          token_stride,
          count,
          dtype_of(dtype)};
}

template <class T>
kdfast::PerRow<T> per_row(const PerRowTuple& tuple) {
  return {reinterpret_cast<const T*>(std::get<0>(tuple)), std::get<1>(tuple)};
}

template <class Real>
void kd_loss_rows(const MatrixTuple& student, const MatrixTuple& teacher,
                  const MatrixTuple& gradient, int64_t outer_rows, int64_t inner_rows,
                  int64_t width, int64_t vocab_size, const PerRowTuple& labels,
                  int64_t ignore_index, const PerRowTuple& token_weight,
                  const PerRowTuple& temperature, const PerRowTuple& teacher_temperature,
                  const PerRowTuple& grad_scale, Address losses, int divergence, double beta,
                  double alpha, bool scale_t2, bool need_hard, int threads) {
  const kdfast::KdLossRows<Real> call{matrix(student),
                                      matrix(teacher),
                                      matrix(gradient),
                                      outer_rows,
                                      inner_rows,
                                      width,
                                      vocab_size,
                                      per_row<int64_t>(labels),
                                      ignore_index,
                                      per_row<Real>(token_weight),
                                      per_row<Real>(temperature),
                                      per_row<Real>(teacher_temperature),
                                      per_row<Real>(grad_scale),
                                      reinterpret_cast<Real*>(losses),
                                      static_cast<kdfast::Divergence>(divergence),
                                      beta,
                                      alpha,
                                      scale_t2,
                                      need_hard,
                                      threads};
  py::gil_scoped_release release;
  kdfast::kd_loss_rows(call);
}

template <class Real>
kdfast::HiddenRows<Real> hidden_rows(const MatrixTuple& student, const MatrixTuple& teacher,
                                     const MatrixTuple& gradient, int64_t outer_rows,
                                     int64_t inner_rows, int64_t width, const PerRowTuple& mask,
                                     const PerRowTuple& grad_scale, Address losses, int threads) {
  return {matrix(student),
          matrix(teacher),
          matrix(gradient),
          outer_rows,
          inner_rows,
          width,
          per_row<bool>(mask),
          per_row<Real>(grad_scale),
          reinterpret_cast<Real*>(losses),
          threads};
}

template <class Real>
void hidden_mse_rows(const MatrixTuple& student, const MatrixTuple& teacher,
                     const MatrixTuple& gradient, int64_t outer_rows, int64_t inner_rows,
                     int64_t width, const PerRowTuple& mask, const PerRowTuple& grad_scale,
                     Address losses, Address bias, int threads) {
  const auto call = hidden_rows<Real>(student, teacher, gradient, outer_rows, inner_rows, width,
                                      mask, grad_scale, losses, threads);
  py::gil_scoped_release release;
  kdfast::hidden_mse_rows(call, reinterpret_cast<const Real*>(bias));
}

template <class Real>
void hidden_cosine_rows(const MatrixTuple& student, const MatrixTuple& teacher,
                        const MatrixTuple& gradient, int64_t outer_rows, int64_t inner_rows,
                        int64_t width, const PerRowTuple& mask, const PerRowTuple& grad_scale,
                        Address losses, double epsilon, int threads) {
  const auto call = hidden_rows<Real>(student, teacher, gradient, outer_rows, inner_rows, width,
                                      mask, grad_scale, losses, threads);
  py::gil_scoped_release release;
  kdfast::hidden_cosine_rows(call, epsilon);
}

template <class Real>
void truncated_softmax_rows(const MatrixTuple& logits, int64_t outer_rows, int64_t inner_rows,
                            int64_t vocab_size, int64_t k, const PerRowTuple& temperature,
                            Address log_probs, Address indices, int threads) {
  const kdfast::TruncatedSoftmaxRows<Real> call{matrix(logits),
                                                outer_rows,
                                                inner_rows,
                                                vocab_size,
                                                k,
                                                per_row<Real>(temperature),
                                                reinterpret_cast<Real*>(log_probs),
                                                reinterpret_cast<int64_t*>(indices),
                                                threads};
  py::gil_scoped_release release;
  kdfast::truncated_softmax_rows(call);
}

template <class Real>
void topk_kd_loss_rows(const MatrixTuple& student, const MatrixTuple& gradient, Address log_probs,
                       Address indices, int64_t outer_rows, int64_t inner_rows, int64_t width,
                       int64_t vocab_size, int64_t entries, const PerRowTuple& labels,
                       int64_t ignore_index, const PerRowTuple& token_weight,
                       const PerRowTuple& temperature, const PerRowTuple& grad_scale,
                       Address losses, int tail, int divergence, double beta, double alpha,
                       bool scale_t2, bool need_hard, double smallest_bucket, int threads) {
  const kdfast::TopkKdLossRows<Real> call{matrix(student),
                                          matrix(gradient),
                                          reinterpret_cast<const Real*>(log_probs),
                                          reinterpret_cast<const int64_t*>(indices),
                                          outer_rows,
                                          inner_rows,
                                          width,
                                          vocab_size,
                                          entries,
                                          per_row<int64_t>(labels),
                                          ignore_index,
                                          per_row<Real>(token_weight),
                                          per_row<Real>(temperature),
                                          per_row<Real>(grad_scale),
                                          reinterpret_cast<Real*>(losses),
                                          static_cast<kdfast::Tail>(tail),
                                          static_cast<kdfast::Divergence>(divergence),
                                          beta,
                                          alpha,
                                          scale_t2,
                                          need_hard,
                                          smallest_bucket,
                                          threads};
  py::gil_scoped_release release;
  kdfast::topk_kd_loss_rows(call);
}

template <class Real>
void entry_logits(const MatrixTuple& hidden, const MatrixTuple& weight, Address indices,
                  int64_t rows, int64_t entries, int64_t width, Address logits, int threads) {
  const kdfast::EntryLogits<Real> call{
      matrix(hidden), matrix(weight), reinterpret_cast<const int64_t*>(indices), rows,
      entries,        width,          reinterpret_cast<Real*>(logits),           threads};
  py::gil_scoped_release release;
  kdfast::entry_logits(call);
}

template <class Real>
void entry_hidden_gradient(Address gradient, const MatrixTuple& weight, Address indices,
                           int64_t rows, int64_t entries, int64_t width, Address out, int threads) {
  const kdfast::EntryHiddenGradient<Real> call{reinterpret_cast<const Real*>(gradient),
                                               matrix(weight),
                                               reinterpret_cast<const int64_t*>(indices),
                                               rows,
                                               entries,
                                               width,
                                               reinterpret_cast<Real*>(out),
                                               threads};
  py::gil_scoped_release release;
  kdfast::entry_hidden_gradient(call);
}

template <class Real>
void entry_weight_gradient(Address gradient, const MatrixTuple& hidden, Address order,
                           Address offsets, int64_t entries, int64_t width, int64_t out_rows,
                           Address out, int threads) {
  const kdfast::EntryWeightGradient<Real> call{reinterpret_cast<const Real*>(gradient),
                                               matrix(hidden),
                                               reinterpret_cast<const int64_t*>(order),
                                               reinterpret_cast<const int64_t*>(offsets),
                                               entries,
                                               width,
                                               out_rows,
                                               reinterpret_cast<Real*>(out),
                                               threads};
  py::gil_scoped_release release;
  kdfast::entry_weight_gradient(call);
}

template <class Real>
void attention_mse(const HeadsTuple& student_query, const HeadsTuple& student_key,
                   const HeadsTuple& teacher_query, const HeadsTuple& teacher_key,
                   const HeadsTuple& query_gradient, const HeadsTuple& key_gradient,
                   Address query_mask, Address key_mask, const PerRowTuple& factor, int64_t samples,
                   int64_t tokens, int64_t student_width, int64_t teacher_width, double ratio,
                   bool causal, bool tiled, Address sums, int threads) {
  const kdfast::AttentionMse<Real> call{heads(student_query),
                                        heads(student_key),
                                        heads(teacher_query),
                                        heads(teacher_key),
                                        heads(query_gradient),
                                        heads(key_gradient),
                                        reinterpret_cast<const bool*>(query_mask),
                                        reinterpret_cast<const bool*>(key_mask),
                                        per_row<Real>(factor),
                                        samples,
                                        tokens,
                                        student_width,
                                        teacher_width,
                                        static_cast<Real>(ratio),
                                        causal,
                                        tiled,
                                        reinterpret_cast<double*>(sums),
                                        threads};
  py::gil_scoped_release release;
  kdfast::attention_mse(call);
}

void matmul(const MatrixTuple& left, const MatrixTuple& right, Address out, int64_t out_row,
            int64_t rows, int64_t columns, int64_t depth, bool add, int threads) {
  const auto factor = [](const MatrixTuple& tuple) -> kdfast::Factor {
    const kdfast::Matrix found = matrix(tuple);
    return {found.data, found.outer_stride, found.inner_stride, found.dtype};
  };
  const kdfast::MatMul call{factor(left), factor(right), reinterpret_cast<float*>(out),
                            out_row,      rows,          columns,
                            depth,        add,           threads};
  py::gil_scoped_release release;
  kdfast::matmul(call);
}

#if defined(KDFAST_CUDA)

// Address and step of one value per row; without an address, the value for all of them.
using RowValuesTuple = std::tuple<Address, int64_t, float>;

kdfast::RowValues row_values(const RowValuesTuple& tuple) {
  const auto& [data, step, otherwise] = tuple;
  return {reinterpret_cast<const float*>(data), step, otherwise};
}

void kd_loss_rows_cuda(const MatrixTuple& student, const MatrixTuple& teacher,
                       const MatrixTuple& gradient, int64_t rows, int64_t inner_rows, int64_t width,
                       int vocab_size, Address labels, int64_t ignore_index,
                       const RowValuesTuple& token_weight, const RowValuesTuple& temperature,
                       const RowValuesTuple& teacher_temperature, const RowValuesTuple& grad_scale,
                       Address losses, int divergence, double beta, double alpha, bool scale_t2,
                       bool need_hard, bool hard_is_soft, int blocks, int device,
                       uintptr_t stream) {
  kdfast::ClusterKdLoss call = {};
  call.student = matrix(student);
  call.teacher = matrix(teacher);
  call.gradient = matrix(gradient);
  call.rows = rows;
  call.inner_rows = inner_rows;
  call.width = width;
  call.vocab_size = vocab_size;
  call.labels = reinterpret_cast<const int64_t*>(labels);
  call.ignore_index = ignore_index;
  call.token_weight = row_values(token_weight);
  call.temperature = row_values(temperature);
  call.teacher_temperature = row_values(teacher_temperature);
  call.grad_scale = row_values(grad_scale);
  call.losses = reinterpret_cast<float*>(losses);
  call.divergence = static_cast<kdfast::Divergence>(divergence);
  kdfast::set_shares(call, beta, alpha);
  call.scale_t2 = scale_t2;
  call.need_hard = need_hard;
  call.hard_is_soft = hard_is_soft;
  py::gil_scoped_release release;
  const std::string error = kdfast::kd_loss_in_clusters(call, blocks, device, stream);
  if (!error.empty()) throw std::runtime_error("kd_loss: the CUDA kernel did not start: " + error);
}

void define_cuda(py::module_& module) {
  module.def("cuda_runtime_problem", &kdfast::cuda_runtime_problem);
  module.def(
      "plan_kd_loss_cluster",
      [](int device, int64_t vocab_size, const std::string& student, const std::string& teacher,
         int divergence) {
        const kdfast::ClusterPlan plan =
            kdfast::plan_kd_loss_cluster(device, vocab_size, dtype_of(student), dtype_of(teacher),
                                         static_cast<kdfast::Divergence>(divergence));
        return std::pair(plan.blocks, plan.reason);
      },
      py::arg("device"), py::arg("vocab_size"), py::arg("student"), py::arg("teacher"),
      py::arg("divergence"));
  module.def(
      "kd_loss_block_bytes",
      [](int vocab_size, int blocks, const std::string& student, const std::string& teacher) {
        return kdfast::kd_loss_block_bytes(vocab_size, blocks, dtype_of(student),
                                           dtype_of(teacher));
      },
      py::arg("vocab_size"), py::arg("blocks"), py::arg("student"), py::arg("teacher"));
  module.def("kd_loss_rows_cuda", &kd_loss_rows_cuda, py::kw_only(), py::arg("student"),
             py::arg("teacher"), py::arg("gradient"), py::arg("rows"), py::arg("inner_rows"),
             py::arg("width"), py::arg("vocab_size"), py::arg("labels"), py::arg("ignore_index"),
             py::arg("token_weight"), py::arg("temperature"), py::arg("teacher_temperature"),
             py::arg("grad_scale"), py::arg("losses"), py::arg("divergence"), py::arg("beta"),
             py::arg("alpha"), py::arg("scale_t2"), py::arg("need_hard"), py::arg("hard_is_soft"),
             py::arg("blocks"), py::arg("device"), py::arg("stream"));
}

#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
#if defined(KDFAST_CUDA)
  define_cuda(module);
#endif
  module.def("matmul", matmul, py::kw_only(), py::arg("left"), py::arg("right"), py::arg("out"),
             py::arg("out_row"), py::arg("rows"), py::arg("columns"), py::arg("depth"),
             py::arg("add"), py::arg("threads"));
  module.def("has_unused_vectors", kdfast::has_unused_vectors);

  const auto define_attention_mse = [&module](const char* name, auto function) {
    module.def(name, function, py::kw_only(), py::arg("student_query"), py::arg("student_key"),
               py::arg("teacher_query"), py::arg("teacher_key"), py::arg("query_gradient"),
               py::arg("key_gradient"), py::arg("query_mask"), py::arg("key_mask"),
               py::arg("factor"), py::arg("samples"), py::arg("tokens"), py::arg("student_width"),
               py::arg("teacher_width"), py::arg("ratio"), py::arg("causal"), py::arg("tiled"),
               py::arg("sums"), py::arg("threads"));
  };
  define_attention_mse("attention_mse_float32", attention_mse<float>);
  define_attention_mse("attention_mse_float64", attention_mse<double>);

  const auto define_kd_loss_rows = [&module](const char* name, auto function) {
    module.def(name, function, py::kw_only(), py::arg("student"), py::arg("teacher"),
               py::arg("gradient"), py::arg("outer_rows"), py::arg("inner_rows"), py::arg("width"),
               py::arg("vocab_size"), py::arg("labels"), py::arg("ignore_index"),
               py::arg("token_weight"), py::arg("temperature"), py::arg("teacher_temperature"),
               py::arg("grad_scale"), py::arg("losses"), py::arg("divergence"), py::arg("beta"),
               py::arg("alpha"), py::arg("scale_t2"), py::arg("need_hard"), py::arg("threads"));
  };
  define_kd_loss_rows("kd_loss_rows_float32", kd_loss_rows<float>);
  define_kd_loss_rows("kd_loss_rows_float64", kd_loss_rows<double>);

  module.def(
      "prefer_huge_pages",
      [](Address data, int64_t bytes) {
        kdfast::prefer_huge_pages(reinterpret_cast<char*>(data), bytes);
      },
      py::arg("data"), py::arg("bytes"));

  const auto define_truncated_softmax_rows = [&module](const char* name, auto function) {
    module.def(name, function, py::kw_only(), py::arg("logits"), py::arg("outer_rows"),
               py::arg("inner_rows"), py::arg("vocab_size"), py::arg("k"), py::arg("temperature"),
               py::arg("log_probs"), py::arg("indices"), py::arg("threads"));
  };
  define_truncated_softmax_rows("truncated_softmax_rows_float32", truncated_softmax_rows<float>);
  define_truncated_softmax_rows("truncated_softmax_rows_float64", truncated_softmax_rows<double>);

  const auto define_topk_kd_loss_rows = [&module](const char* name, auto function) {
    module.def(name, function, py::kw_only(), py::arg("student"), py::arg("gradient"),
               py::arg("log_probs"), py::arg("indices"), py::arg("outer_rows"),
               py::arg("inner_rows"), py::arg("width"), py::arg("vocab_size"), py::arg("entries"),
               py::arg("labels"), py::arg("ignore_index"), py::arg("token_weight"),
               py::arg("temperature"), py::arg("grad_scale"), py::arg("losses"), py::arg("tail"),
               py::arg("divergence"), py::arg("beta"), py::arg("alpha"), py::arg("scale_t2"),
               py::arg("need_hard"), py::arg("smallest_bucket"), py::arg("threads"));
  };
  define_topk_kd_loss_rows("topk_kd_loss_rows_float32", topk_kd_loss_rows<float>);
  define_topk_kd_loss_rows("topk_kd_loss_rows_float64", topk_kd_loss_rows<double>);

  const auto define_entry_functions = [&module](const std::string& type, auto logits,
                                                auto hidden_gradient, auto weight_gradient) {
    module.def(("entry_logits_" + type).c_str(), logits, py::kw_only(), py::arg("hidden"),
               py::arg("weight"), py::arg("indices"), py::arg("rows"), py::arg("entries"),
               py::arg("width"), py::arg("logits"), py::arg("threads"));
    module.def(("entry_hidden_gradient_" + type).c_str(), hidden_gradient, py::kw_only(),
               py::arg("gradient"), py::arg("weight"), py::arg("indices"), py::arg("rows"),
               py::arg("entries"), py::arg("width"), py::arg("out"), py::arg("threads"));
    module.def(("entry_weight_gradient_" + type).c_str(), weight_gradient, py::kw_only(),
               py::arg("gradient"), py::arg("hidden"), py::arg("order"), py::arg("offsets"),
               py::arg("entries"), py::arg("width"), py::arg("out_rows"), py::arg("out"),
               py::arg("threads"));
  };
  define_entry_functions("float32", entry_logits<float>, entry_hidden_gradient<float>,
                         entry_weight_gradient<float>);
  define_entry_functions("float64", entry_logits<double>, entry_hidden_gradient<double>,
                         entry_weight_gradient<double>);

  const auto define_hidden_rows = [&module](const std::string& type, auto mse, auto cosine) {
    const auto define = [&](const std::string& name, auto function, const char* last) {
      module.def((name + "_" + type).c_str(), function, py::kw_only(), py::arg("student"),
                 py::arg("teacher"), py::arg("gradient"), py::arg("outer_rows"),
                 py::arg("inner_rows"), py::arg("width"), py::arg("mask"), py::arg("grad_scale"),
                 py::arg("losses"), py::arg(last), py::arg("threads"));
    };
    define("hidden_mse_rows", mse, "bias");
    define("hidden_cosine_rows", cosine, "epsilon");
  };
  define_hidden_rows("float32", hidden_mse_rows<float>, hidden_cosine_rows<float>);
  define_hidden_rows("float64", hidden_mse_rows<double>, hidden_cosine_rows<double>);
}
