// The module kdfast._C: addresses, sizes and strides in, nothing of torch. Python has checked every
// argument before it comes here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <tuple>

#include "cpu/kd_loss.h"
#include "cpu/linear_topk_kd_loss.h"
#include "cpu/pages.h"
#include "cpu/topk_kd_loss.h"
#include "cpu/truncated_softmax.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;
using MatrixTuple = std::tuple<Address, int64_t, int64_t, std::string>;
using PerRowTuple = std::tuple<Address, int64_t>;

kdfast::Matrix matrix(const MatrixTuple& tuple) {
  static const std::map<std::string, kdfast::DType> dtypes = {
      {"float32", kdfast::DType::kFloat32},
      {"bfloat16", kdfast::DType::kBFloat16},
      {"float16", kdfast::DType::kFloat16},
      {"float64", kdfast::DType::kFloat64},
  };
  const auto& [data, outer_stride, inner_stride, dtype] = tuple;
  return {reinterpret_cast<char*>(data), outer_stride, inner_stride, dtypes.at(dtype)};
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

}  // namespace

PYBIND11_MODULE(_C, module) {
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
}
