// correlation_topk for CPU tensors. The search stands in match.h.
#include "match.h"

#include "../stable.h"

namespace ragsr {
namespace {

template <class T>
void search_batch(const Tensor& a, const Tensor& b, int64_t patch, int64_t padding, double eps, Tensor& score,
                  Tensor& index) {
  static const SearchKernel<T> kernel = choose_search_kernel<T>();
  const auto parallel = [](int64_t tasks, const auto& body) {
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) body(task);
    });
  };
  const auto map = [&](const Tensor& x, int64_t batch) {
    const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
    return PatchMap<T>{x.const_data_ptr<T>() + batch * channels * height * width, channels, height, width, patch,
                       padding};
  };
  const int64_t k = score.size(2), positions = score.size(1);
  for (int64_t batch = 0; batch < a.size(0); ++batch) {
    const MatchAnswer<T> answer{score.mutable_data_ptr<T>() + batch * positions * k,
                                index.mutable_data_ptr<int64_t>() + batch * positions * k, k};
    correlation_topk(kernel, map(a, batch), map(b, batch), static_cast<T>(eps), answer,
                     torch::stable::get_num_threads(), parallel);
  }
}

std::tuple<Tensor, Tensor> correlation_topk_cpu(const Tensor& a, const Tensor& b, int64_t k, int64_t patch,
                                                int64_t padding, double eps) {
  STD_TORCH_CHECK(a.dim() == 4 && b.dim() == 4 && a.size(0) == b.size(0) && a.size(1) == b.size(1),
                  "maps must be [batch, channels, height, width], batch and channels equal");
  const auto positions = [&](const Tensor& x) {
    const int64_t rows = x.size(2) + 2 * padding - patch + 1, columns = x.size(3) + 2 * padding - patch + 1;
    STD_TORCH_CHECK(patch >= 1 && padding >= 0 && rows >= 1 && columns >= 1, "a patch must fit into the map");
    return rows * columns;
  };
  const int64_t queries = positions(a);
  STD_TORCH_CHECK(1 <= k && k <= positions(b), "k must lie between 1 and the number of positions");
  const Scalar wide = a.scalar_type() == Scalar::Double ? Scalar::Double : Scalar::Float;
  const Tensor wide_a = torch::stable::contiguous(torch::stable::to(a, wide));
  const Tensor wide_b = torch::stable::contiguous(torch::stable::to(b, wide));
  Tensor score = empty_on(a, {a.size(0), queries, k}, wide);
  Tensor index = empty_on(a, {a.size(0), queries, k}, Scalar::Long);
  if (wide == Scalar::Double)
    search_batch<double>(wide_a, wide_b, patch, padding, eps, score, index);
  else
    search_batch<float>(wide_a, wide_b, patch, padding, eps, score, index);
  return {score, index};
}

}  // namespace
}  // namespace ragsr

STABLE_TORCH_LIBRARY_IMPL(ragsr, CPU, m) {
  m.impl("correlation_topk", TORCH_BOX(&ragsr::correlation_topk_cpu));
}
