// group_norm_sft and its backward for CPU tensors. The kernels stand in sft.h and sft_backward.h; sft_operands.h makes
// tensors into what they read.
#include <string>
#include <tuple>
#include <vector>

#include "../stable.h"

#include "sft_backward.h"
#include "sft_operands.h"
#include "sft_targets.h"

namespace ragsr::sft {
namespace {

// ---------------------------------------------------------------- which kernels

template <class T>
Kernels<float> choose_kernels(bool along_channels) {
  struct Named {
    const char* name;
    Kernels<float> kernels;
  };
  std::vector<Named> all{{"portable", portable::kernels<T>(along_channels)}};
#ifdef RAGSR_X86
  all.push_back({"avx2", avx2::kernels<T>(along_channels)});
  all.push_back({"avx512", avx512::kernels<T>(along_channels)});
#endif
  return choose(all).kernels;
}

template <class T>
const Kernels<float>& float_kernels(bool along_channels) {
  static const Kernels<float> table[2] = {choose_kernels<T>(false), choose_kernels<T>(true)};
  return table[along_channels];
}

// f(kernels) with those of a dtype, for rows along channels or along positions.
template <class F>
auto with_kernels(Scalar dtype, bool along_channels, const F& f) {
  if (dtype == Scalar::Double) return f(exact::kernels<double>(along_channels));
  if (dtype == Scalar::Float) return f(float_kernels<float>(along_channels));
  if (dtype == Scalar::Half) return f(float_kernels<Half>(along_channels));
  STD_TORCH_CHECK(dtype == Scalar::BFloat16, "the operands must be float16, bfloat16, float32 or float64");
  return f(float_kernels<BFloat16>(along_channels));
}

Options options(const std::optional<std::string>& activation, const std::optional<double>& raw_mix, double eps) {
  const std::string name = activation.value_or("none");
  STD_TORCH_CHECK(name == "none" || name == "silu" || name == "relu", "activation must be None, silu or relu");
  const Activation kind = name == "silu" ? Activation::silu : name == "relu" ? Activation::relu : Activation::none;
  return {kind, raw_mix.has_value(), raw_mix.value_or(1), eps};
}

// body(task) for every task; each works on `size` elements, and few elements are not worth a second thread.
constexpr auto in_parallel = [](int64_t tasks, int64_t size, const auto& body) {
  constexpr int64_t kWorthwhile = 1 << 14;
  const int64_t grain = std::max<int64_t>(1, kWorthwhile / std::max<int64_t>(1, size));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(task);
  });
};

// ---------------------------------------------------------------- forward

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, int64_t groups, const Tensor& weight, const Tensor& bias,
                                           const Tensor& gamma, const Tensor& beta, double eps,
                                           std::optional<std::string> activation, Maybe residual, Maybe x2,
                                           std::optional<double> raw_mix) {
  Call call(x, groups, x2, weight, bias);
  Tensor out = call.fresh(call.sizes), mean = call.fresh_statistics(), rstd = call.fresh_statistics();
  call.operands.gamma = call.map_or_constants(gamma);
  call.operands.beta = call.map_or_constants(beta);
  if (residual) call.operands.residual = call.map(*residual);
  call.operands.out = call.map(out);
  const Options chosen = options(activation, raw_mix, eps);
  with_kernels(x.scalar_type(), call.shape.channels_last, [&](const auto& kernels) {
    Forward(kernels, call.shape, call.operands, chosen, mean.mutable_data_ptr(), rstd.mutable_data_ptr())
        .run(torch::stable::get_num_threads(), in_parallel);
  });
  return {out, mean, rstd};
}

// ---------------------------------------------------------------- backward

// Sums per sample and channel into the first `samples` x C elements of `out`, over all samples if there is one.
template <class Real>
void write_sums(const Kernels<Real>& kernels, const std::vector<double>& sums, int64_t samples, Tensor& out) {
  const auto elements = static_cast<size_t>(out.numel());
  std::vector<double> total(elements);
  if (samples == 1) {
    for (size_t i = 0; i < sums.size(); ++i) total[i % elements] += sums[i];
  } else {
    total = sums;
  }
  const std::vector<Real> rounded(total.begin(), total.end());
  kernels.narrow(rounded.data(), out.numel(), out.mutable_data_ptr());
}

// In place of a gradient that nobody asked for.
Tensor unwanted(const Tensor& operand) { return empty_on(operand, {0}, operand.scalar_type()); }

// The gradient of γ or β: written as a map and summed over what was broadcast, or, where the operand is constant over
// the positions, made of the sums of each channel.
class MapGradient {
 public:
  MapGradient(Call& call, const Tensor& operand, bool wanted)
      : operand_(operand), sizes_(sizes_of(operand)), wanted_(wanted) {
    if (!wanted) return;
    const bool spans = std::any_of(sizes_.begin() + 2, sizes_.end(), [](int64_t size) { return size != 1; });
    if (!spans && sizes_ != call.sizes) return;
    full_ = call.fresh(call.sizes);
    map_ = call.map(*full_);
  }

  const Map& map() const { return map_; }  // null where sums are wanted

  template <class Real>
  Tensor finish(const Kernels<Real>& kernels, const Call& call, const std::vector<double>& sums) const {
    if (!wanted_) return unwanted(operand_);
    if (sizes_ == call.sizes) return rearranged(*full_, is_channels_last(operand_));
    Tensor out = arranged(operand_, sizes_, is_channels_last(operand_));
    if (!full_) {
      write_sums(kernels, sums, sizes_[0], out);
      return out;
    }
    Sizes broadcast;
    for (size_t d = 0; d < sizes_.size(); ++d)
      if (sizes_[d] != call.sizes[d]) broadcast.push_back(static_cast<int64_t>(d));
    torch::stable::copy_(out, torch::stable::sum(*full_, broadcast, true));
    return out;
  }

 private:
  Tensor operand_;
  Sizes sizes_;
  bool wanted_;
  Maybe full_;
  Map map_;
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& grad, const Tensor& x, int64_t groups, const Tensor& weight, const Tensor& bias,
                   const Tensor& gamma, const Tensor& beta, const Tensor& mean, const Tensor& rstd,
                   std::optional<std::string> activation, Maybe x2, std::optional<double> raw_mix, bool of_x,
                   bool of_gamma, bool of_beta) {
  Call call(x, groups, x2, weight, bias);
  const Sizes first = call.with_channels(x.size(1)), second = call.with_channels(call.sizes[1] - x.size(1));
  Tensor dx = of_x ? call.fresh(first) : unwanted(x), dx2 = of_x ? call.fresh(second) : unwanted(x);
  Tensor dweight = torch::stable::empty_like(weight), dbias = torch::stable::empty_like(bias);
  MapGradient dgamma(call, gamma, of_gamma), dbeta(call, beta, of_beta);
  call.operands.grad = call.map_or_constants(grad);
  call.operands.gamma = call.map_or_constants(gamma);
  call.operands.beta = call.map_or_constants(beta);
  call.operands.dgamma = dgamma.map();
  call.operands.dbeta = dbeta.map();
  if (of_x) call.operands.dx = call.map(dx, first);
  if (of_x && x2) call.operands.dx2 = call.map(dx2, second);
  const Tensor means = dense(mean), rstds = dense(rstd);
  const Options chosen = options(activation, raw_mix, 0);
  return with_kernels(x.scalar_type(), call.shape.channels_last, [&](const auto& kernels) -> Gradients {
    Backward work(kernels, call.shape, call.operands, chosen, means.const_data_ptr(), rstds.const_data_ptr());
    work.run(torch::stable::get_num_threads(), in_parallel);
    write_sums(kernels, work.sums(kAffineZ), 1, dweight);
    write_sums(kernels, work.sums(kAffine), 1, dbias);
    return {of_x ? rearranged(dx, is_channels_last(x)) : dx,
            dweight,
            dbias,
            dgamma.finish(kernels, call, work.sums(kTAffine)),
            dbeta.finish(kernels, call, work.sums(kT)),
            of_x ? rearranged(dx2, is_channels_last(x2 ? *x2 : x)) : dx2};
  });
}

}  // namespace
}  // namespace ragsr::sft

STABLE_TORCH_LIBRARY_IMPL(ragsr, CPU, m) {
  m.impl("group_norm_sft_forward", TORCH_BOX(&ragsr::sft::forward));
  m.impl("group_norm_sft_backward", TORCH_BOX(&ragsr::sft::backward));
}
