// unit_rows and keep_best for CPU tensors: what cosine_topk does around the matrix product. Kernels are in cosine.h.
#include "cosine.h"

#include <vector>

#include "../stable.h"

namespace ragsr {
namespace {

template <class T>
void unit_rows_of(const Tensor& x, Tensor& out) {
  const int64_t n = x.size(1);
  const auto from = static_cast<const T*>(x.const_data_ptr());
  const auto to = static_cast<T*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, x.size(0), 1 + 8192 / (n + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) unit_row(from + row * n, n, to + row * n);
  });
}

// x [rows, D], any float type and strides, as rows of length one: float32, float64 for float64.
Tensor unit_rows(const Tensor& any) {
  STD_TORCH_CHECK(any.dim() == 2, "unit_rows: x must be [rows, features]");
  const bool wide = any.scalar_type() == Scalar::Double;
  const Tensor x = torch::stable::contiguous(wide ? any : torch::stable::to(any, Scalar::Float));
  Tensor out = empty_on(x, {x.size(0), x.size(1)}, x.scalar_type());
  wide ? unit_rows_of<double>(x, out) : unit_rows_of<float>(x, out);
  return out;
}

template <class T>
void keep_best_of(const Tensor& best, const Tensor& scores, int64_t first, Tensor& out) {
  const int64_t n = scores.size(1), kept = best.size(1), k = out.size(1);
  const int64_t* from = best.const_data_ptr<int64_t>();
  const auto score = static_cast<const T*>(scores.const_data_ptr());
  int64_t* to = out.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, scores.size(0), 1 + 16384 / (n + 1), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> keys(static_cast<size_t>(BestKeys::room(k)));
    for (int64_t row = begin; row < end; ++row) {
      std::copy(from + row * kept, from + (row + 1) * kept, keys.begin());
      BestKeys row_best(keys.data(), kept, k);
      offer_scores(score + row * n, n, first, row_best);
      row_best.finish();
      std::copy(keys.begin(), keys.begin() + k, to + row * k);
    }
  });
}

// best int64 [rows, kept], sorted; scores [rows, n] of the references from `first` on -> int64 [rows, min(k, kept + n)]
Tensor keep_best(const Tensor& best, const Tensor& scores, int64_t first, int64_t k) {
  const bool wide = scores.scalar_type() == Scalar::Double;
  STD_TORCH_CHECK(best.dim() == 2 && scores.dim() == 2 && best.size(0) == scores.size(0) && best.size(1) <= k,
                  "keep_best: best must be [rows, at most k] and scores [rows, references]");
  STD_TORCH_CHECK(best.scalar_type() == Scalar::Long, "keep_best: best must be int64");
  const Tensor before = torch::stable::contiguous(best);
  const Tensor block = torch::stable::contiguous(wide ? scores : torch::stable::to(scores, Scalar::Float));
  Tensor out = empty_on(before, {block.size(0), std::min(k, before.size(1) + block.size(1))}, Scalar::Long);
  wide ? keep_best_of<double>(before, block, first, out) : keep_best_of<float>(before, block, first, out);
  return out;
}

}  // namespace
}  // namespace ragsr

STABLE_TORCH_LIBRARY_IMPL(ragsr, CPU, m) {
  m.impl("unit_rows", TORCH_BOX(&ragsr::unit_rows));
  m.impl("keep_best", TORCH_BOX(&ragsr::keep_best));
}
