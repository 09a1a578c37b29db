// correlation_topk and correlation_topk_near for CPU tensors. The searches stand in match.h and match_near.h.
#include "match.h"

#include "match_near.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "../stable.h"

namespace ragsr {
namespace {

const auto parallel = [](int64_t tasks, const auto& body) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(task);
  });
};

template <class T>
PatchMap<T> map_of(const Tensor& x, int64_t batch, int64_t patch, int64_t padding) {
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  return {x.const_data_ptr<T>() + batch * channels * height * width, channels, height, width, patch, padding};
}

template <class T>
MatchAnswer<T> answer_of(Tensor& score, Tensor& index, int64_t batch) {
  const int64_t k = score.size(2), first = batch * score.size(1) * k;
  return {score.mutable_data_ptr<T>() + first, index.mutable_data_ptr<int64_t>() + first, k};
}

int64_t positions(const Tensor& x, int64_t patch, int64_t padding) {
  const int64_t rows = x.size(2) + 2 * padding - patch + 1, columns = x.size(3) + 2 * padding - patch + 1;
  STD_TORCH_CHECK(patch >= 1 && padding >= 0 && rows >= 1 && columns >= 1, "a patch must fit into the map");
  return rows * columns;
}

void check_pair(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.dim() == 4 && b.dim() == 4 && a.size(0) == b.size(0) && a.size(1) == b.size(1),
                  "maps must be [batch, channels, height, width], batch and channels equal");
}

// Sums are taken in double for double, else in float.
Scalar wide_type(const Tensor& a) { return a.scalar_type() == Scalar::Double ? Scalar::Double : Scalar::Float; }

Tensor widened(const Tensor& x, Scalar wide) { return torch::stable::contiguous(torch::stable::to(x, wide)); }

template <class T>
const SearchKernel<T>& search_kernel() {
  static const SearchKernel<T> kernel = choose_search_kernel<T>();
  return kernel;
}

template <class T>
void search_batch(const Tensor& a, const Tensor& b, int64_t patch, int64_t padding, double eps, Tensor& score,
                  Tensor& index) {
  for (int64_t batch = 0; batch < a.size(0); ++batch)
    correlation_topk(search_kernel<T>(), map_of<T>(a, batch, patch, padding), map_of<T>(b, batch, patch, padding),
                     static_cast<T>(eps), answer_of<T>(score, index, batch), torch::stable::get_num_threads(), parallel);
}

std::tuple<Tensor, Tensor> correlation_topk_cpu(const Tensor& a, const Tensor& b, int64_t k, int64_t patch,
                                                int64_t padding, double eps) {
  check_pair(a, b);
  const int64_t queries = positions(a, patch, padding);
  STD_TORCH_CHECK(1 <= k && k <= positions(b, patch, padding), "k must lie between 1 and the number of positions");
  const Scalar wide = wide_type(a);
  Tensor score = empty_on(a, {a.size(0), queries, k}, wide);
  Tensor index = empty_on(a, {a.size(0), queries, k}, Scalar::Long);
  const auto search = wide == Scalar::Double ? search_batch<double> : search_batch<float>;
  search(widened(a, wide), widened(b, wide), patch, padding, eps, score, index);
  return {score, index};
}

template <class T>
void search_near(const Tensor& a, const std::vector<Tensor>& b, const Tensor& prior, int64_t window, int64_t patch,
                 int64_t padding, double eps, Tensor& score, Tensor& index, Tensor& image) {
  const SearchKernel<T>& kernel = search_kernel<T>();
  for (int64_t batch = 0; batch < a.size(0); ++batch) {
    std::vector<NearReference<T>> references;
    for (const Tensor& one : b)
      references.emplace_back(map_of<T>(one, batch, patch, padding), static_cast<T>(eps), kernel.layout, parallel);
    const Prior expected{prior.const_data_ptr<int64_t>() + batch * score.size(1) * 3, window};
    correlation_topk_near(kernel, map_of<T>(a, batch, patch, padding), references, expected, static_cast<T>(eps),
                          answer_of<T>(score, index, batch),
                          image.mutable_data_ptr<int64_t>() + batch * score.size(1) * score.size(2), parallel);
  }
}

std::tuple<Tensor, Tensor, Tensor> correlation_topk_near_cpu(const Tensor& a, const std::vector<Tensor>& b,
                                                             const Tensor& prior, int64_t window, int64_t k,
                                                             int64_t patch, int64_t padding, double eps) {
  constexpr int64_t kFar = int64_t{1} << 31;  // further than any map reaches
  const int64_t side = 2 * std::min(window, kFar) + 1;
  const Scalar wide = wide_type(a);
  std::vector<Tensor> references;
  for (const Tensor& one : b) {
    check_pair(a, one);
    const int64_t rows = one.size(2) + 2 * padding - patch + 1, columns = positions(one, patch, padding) / rows;
    const int64_t candidates = std::min(side, rows) * std::min(side, columns);
    STD_TORCH_CHECK(window >= 0 && 1 <= k && k <= candidates, "k must lie between 1 and the positions of a window");
    references.push_back(widened(one, wide));
  }
  const int64_t queries = positions(a, patch, padding);
  STD_TORCH_CHECK(!references.empty(), "there must be a reference");
  STD_TORCH_CHECK(prior.scalar_type() == Scalar::Long && prior.dim() == 3 && prior.size(0) == a.size(0) &&
                      prior.size(1) == queries && prior.size(2) == 3,
                  "prior must be int64 [batch, positions of a, 3]");
  Tensor score = empty_on(a, {a.size(0), queries, k}, wide);
  Tensor index = empty_on(a, {a.size(0), queries, k}, Scalar::Long);
  Tensor image = empty_on(a, {a.size(0), queries, k}, Scalar::Long);
  const auto search = wide == Scalar::Double ? search_near<double> : search_near<float>;
  search(widened(a, wide), references, torch::stable::contiguous(prior), std::min(window, kFar), patch, padding, eps, score, index,
         image);
  return {score, index, image};
}

}  // namespace
}  // namespace ragsr

STABLE_TORCH_LIBRARY_IMPL(ragsr, CPU, m) {
  m.impl("correlation_topk", TORCH_BOX(&ragsr::correlation_topk_cpu));
  m.impl("correlation_topk_near", TORCH_BOX(&ragsr::correlation_topk_near_cpu));
}
