// group_norm_sft_forward for CUDA tensors; sft_plan.h says which kernels run.
//
// No atomics but counters of who has arrived: the same bits on every run. Nothing is read back, so a CUDA graph may
// record a call. What blocks tell one another through lies in memory of the call: calls on several streams do not
// meet.
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "sft_device.h"
#include "sft_operands.h"

namespace ragsr {
namespace {

using namespace gpu;

using Maybe = std::optional<Tensor>;

struct Call {
  const Tensor &x, &weight, &bias, &gamma, &beta;
  const Maybe &residual, &x2;
  int64_t groups;
  double eps;
  std::optional<double> raw_mix;
  Activation activation;
  std::optional<Regime> only;
  Tensor &out, &mean, &rstd;
};

template <int V, Along A, class T, class Real>
void launch(CudaDevice& device, const Problem<T, Real>& k, std::optional<Regime> only) {
  STD_TORCH_CHECK((group_norm_sft<V, A>(device, k, only)),
                  "group_norm_sft: this device cannot do these features in the regime that was asked for");
}

template <class T, class Real>
void run(const Call& call, CudaDevice& device) {
  const Sizes sizes = sizes_of(call.out);
  const int64_t channels1 = call.x.size(1), channels = sizes[1], positions = positions_of(sizes);
  const Along along = is_channels_last(call.out) ? Along::channels : Along::positions;
  std::vector<Tensor> kept;
  const auto view = [&](const Tensor& x, int64_t own_channels) {
    STD_TORCH_CHECK(x.scalar_type() == call.x.scalar_type(), "the operands of group_norm_sft must have one dtype");
    Sizes own = sizes;
    own[1] = own_channels;
    return view_of<const T>(x, own, along, kept);
  };
  const auto vector = [&](const Tensor& x) {
    Sizes own(sizes.size(), 1);
    own[1] = channels;
    return view(torch::stable::view(torch::stable::contiguous(x), own), channels);
  };
  const View<const T> absent{};
  const Problem<T, Real> k{
      view(call.x, channels1), call.x2 ? view(*call.x2, channels - channels1) : absent,
      view(call.gamma, channels), view(call.beta, channels),
      call.residual ? view(*call.residual, channels) : absent, view_of<T>(call.out, sizes, along, kept),
      vector(call.weight), vector(call.bias),
      static_cast<Real*>(call.mean.mutable_data_ptr()), static_cast<Real*>(call.rstd.mutable_data_ptr()),
      sizes[0], channels1, channels, positions, call.groups, channels / call.groups,
      static_cast<Real>(call.eps), static_cast<Real>(call.raw_mix.value_or(1)), call.raw_mix.has_value(),
      call.activation};
  if constexpr (sizeof(T) < 8) {
    constexpr int V = 16 / sizeof(T);
    if (along == Along::positions && positions % V == 0)
      return launch<V, Along::positions>(device, k, call.only);
    if (along == Along::channels && channels1 % V == 0 && channels % V == 0)
      return launch<V, Along::channels>(device, k, call.only);
  }
  launch<1, Along::positions>(device, k, call.only);
}

Activation activation_of(const std::optional<std::string>& name) {
  if (!name) return Activation::none;
  STD_TORCH_CHECK(*name == "silu" || *name == "relu", "activation must be None, silu or relu");
  return *name == "silu" ? Activation::silu : Activation::relu;
}

using Result = std::tuple<Tensor, Tensor, Tensor>;

Result forward(std::optional<Regime> only, const Tensor& x, int64_t groups, const Tensor& weight, const Tensor& bias,
               const Tensor& gamma, const Tensor& beta, double eps, const std::optional<std::string>& activation,
               const Maybe& residual, const Maybe& x2, const std::optional<double>& raw_mix) {
  Sizes sizes = sizes_of(x);
  sizes[1] += x2 ? x2->size(1) : 0;
  STD_TORCH_CHECK(groups > 0 && sizes[1] % groups == 0, "groups must divide the channels");
  const Scalar dtype = x.scalar_type(), real = dtype == Scalar::Double ? Scalar::Double : Scalar::Float;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = arranged(x, sizes, is_channels_last(x) && (!x2 || is_channels_last(*x2)));
  Tensor mean = empty_on(x, {sizes[0], groups}, real), rstd = empty_on(x, {sizes[0], groups}, real);
  if (out.numel() == 0) {  // the mean of nothing
    torch::stable::fill_(mean, NAN);
    torch::stable::fill_(rstd, NAN);
    return {out, mean, rstd};
  }
  const Call call{x,       weight,  bias, gamma, beta, residual, x2, groups, eps,
                  raw_mix, activation_of(activation), only, out, mean, rstd};
  CudaDevice device(mean, current_stream(x.get_device_index()));
  switch (dtype) {
    case Scalar::Half: run<torch::headeronly::Half, float>(call, device); break;
    case Scalar::BFloat16: run<torch::headeronly::BFloat16, float>(call, device); break;
    case Scalar::Float: run<float, float>(call, device); break;
    case Scalar::Double: run<double, double>(call, device); break;
    default: STD_TORCH_CHECK(false, "x must be float16, bfloat16, float32 or float64");
  }
  check_started("group_norm_sft", cudaGetLastError());
  return {out, mean, rstd};
}

Result group_norm_sft_forward_cuda(const Tensor& x, int64_t groups, const Tensor& weight, const Tensor& bias,
                                   const Tensor& gamma, const Tensor& beta, double eps,
                                   const std::optional<std::string>& activation, const Maybe& residual,
                                   const Maybe& x2, const std::optional<double>& raw_mix) {
  return forward(std::nullopt, x, groups, weight, bias, gamma, beta, eps, activation, residual, x2, raw_mix);
}

Result group_norm_sft_forward_as(const std::string& regime, const Tensor& x, int64_t groups, const Tensor& weight,
                                 const Tensor& bias, const Tensor& gamma, const Tensor& beta, double eps,
                                 const std::optional<std::string>& activation, const Maybe& residual, const Maybe& x2,
                                 const std::optional<double>& raw_mix) {
  const std::map<std::string, Regime> regimes{
      {"block", Regime::block}, {"cluster", Regime::cluster}, {"grid", Regime::grid}, {"split", Regime::split}};
  const auto only = regimes.find(regime);
  STD_TORCH_CHECK(only != regimes.end(), "regime must be block, cluster, grid or split");
  return forward(only->second, x, groups, weight, bias, gamma, beta, eps, activation, residual, x2, raw_mix);
}

}  // namespace
}  // namespace ragsr

// The second is for tests and benchmarks: the forward in a regime of their choice.
STABLE_TORCH_LIBRARY_FRAGMENT(ragsr, m) {
  m.def(
      "group_norm_sft_forward_as(str regime, Tensor x, int groups, Tensor weight, Tensor bias, Tensor gamma, "
      "Tensor beta, float eps=1e-05, str? activation=None, Tensor? residual=None, Tensor? x2=None, "
      "float? raw_mix=None) "
      "-> (Tensor out, Tensor mean, Tensor rstd)");
}
STABLE_TORCH_LIBRARY_IMPL(ragsr, CUDA, m) {
  m.impl("group_norm_sft_forward", TORCH_BOX(&ragsr::group_norm_sft_forward_cuda));
  m.impl("group_norm_sft_forward_as", TORCH_BOX(&ragsr::group_norm_sft_forward_as));
}
