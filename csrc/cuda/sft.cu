// group_norm_sft_forward for CUDA tensors.
//
//   held         a block reads a group once, keeps it in shared memory while its moments are merged, writes the result
//   otherwise    statistics_kernel   a block: a channel (or, channels-last, up to 256 vectors of them), a part of the
//                                    positions                                        -> mean, m2  [2, B, C, S]
//                merge_kernel        a block: one group, channels and parts in a fixed order -> mean, rstd [B, groups]
//                apply_kernel        a thread: one vector; from the end, where L2 still holds what was read last
//
// No atomics: the same bits on every run. Nothing is read back, so a CUDA graph may record a call.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "sft_kernels.h"
#include "sft_operands.h"
#include "stream.h"

namespace ragsr {
namespace {

using namespace gpu;

// ---------------------------------------------------------------- launches

unsigned grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "group_norm_sft: ", blocks, " blocks are more than a grid holds");
  return static_cast<unsigned>(blocks);
}

struct Chip {
  int processors, shared;  // shared: memory that a block may ask for

  explicit Chip(int device) {
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
};

// Where a group fits; where there is more than one per processor, two must fit, so that one computes while one waits.
// Not measured yet.
template <int V, Along A, class T, class Real>
bool launch_held(const Problem<T, Real>& k, const Chip& chip, cudaStream_t stream) {
  if (A == Along::channels && k.members % V != 0) return false;  // vectors would lie across two groups
  const int64_t bytes = k.members * k.positions * static_cast<int64_t>(sizeof(T)), blocks = k.batch * k.groups;
  constexpr int kOwn = 2048;  // shared memory of merge_block, and what the system keeps per block
  if (bytes > (blocks > chip.processors ? chip.shared / 2 : chip.shared) - kOwn) return false;
  const int64_t threads = std::clamp<int64_t>(ceil_div(bytes, 32 * kInFlight * 16) * 32, 64, kMostThreads);
  const auto kernel = held_kernel<V, A, T, Real>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, chip.shared - kOwn);  // the same for all
  kernel<<<grid(blocks), static_cast<unsigned>(threads), static_cast<size_t>(bytes), stream>>>(k);
  return true;
}

template <int V, Along A, class T, class Real>
void launch(const Problem<T, Real>& k, const Tensor& like, const Chip& chip, cudaStream_t stream) {
  if (launch_held<V, A>(k, chip, stream)) return;
  const Parts parts = parts_of<V, A>(k.batch, k.channels, k.positions, chip.processors);
  Tensor partial = empty_on(like, {2, k.batch, k.channels, parts.splits}, like.scalar_type());
  Real* means = static_cast<Real*>(partial.mutable_data_ptr());
  Real* m2s = means + k.batch * k.channels * parts.splits;
  statistics_kernel<V, A><<<grid(k.batch * parts.blocks * parts.splits), kThreads, 0, stream>>>(k, parts, means, m2s);
  merge_kernel<<<grid(k.batch * k.groups), kThreads, 0, stream>>>(k, parts, means, m2s);
  const int64_t all = k.batch * k.channels * k.positions / V;
  apply_kernel<V, A><<<grid(ceil_div(all, kThreads)), kThreads, 0, stream>>>(k);
}

// ---------------------------------------------------------------- the op

using Maybe = std::optional<Tensor>;

struct Call {
  const Tensor &x, &weight, &bias, &gamma, &beta;
  const Maybe &residual, &x2;
  int64_t groups;
  double eps;
  std::optional<double> raw_mix;
  Activation activation;
  Tensor &out, &mean, &rstd;
};

template <class T, class Real>
void run(const Call& call, const Chip& chip, cudaStream_t stream) {
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
      return launch<V, Along::positions>(k, call.mean, chip, stream);
    if (along == Along::channels && channels1 % V == 0 && channels % V == 0)
      return launch<V, Along::channels>(k, call.mean, chip, stream);
  }
  launch<1, Along::positions>(k, call.mean, chip, stream);
}

Activation activation_of(const std::optional<std::string>& name) {
  if (!name) return Activation::none;
  STD_TORCH_CHECK(*name == "silu" || *name == "relu", "activation must be None, silu or relu");
  return *name == "silu" ? Activation::silu : Activation::relu;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_sft_forward_cuda(
    const Tensor& x, int64_t groups, const Tensor& weight, const Tensor& bias, const Tensor& gamma, const Tensor& beta,
    double eps, const std::optional<std::string>& activation, const Maybe& residual, const Maybe& x2,
    const std::optional<double>& raw_mix) {
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
  const Chip chip(x.get_device_index());
  const Call call{x,   weight,  bias,   gamma,  beta, residual, x2, groups,
                  eps, raw_mix, activation_of(activation), out, mean, rstd};
  const cudaStream_t stream = current_stream(x.get_device_index());
  switch (dtype) {
    case Scalar::Half: run<torch::headeronly::Half, float>(call, chip, stream); break;
    case Scalar::BFloat16: run<torch::headeronly::BFloat16, float>(call, chip, stream); break;
    case Scalar::Float: run<float, float>(call, chip, stream); break;
    case Scalar::Double: run<double, double>(call, chip, stream); break;
    default: STD_TORCH_CHECK(false, "x must be float16, bfloat16, float32 or float64");
  }
  check_started("group_norm_sft", cudaGetLastError());
  return {out, mean, rstd};
}

}  // namespace
}  // namespace ragsr

STABLE_TORCH_LIBRARY_IMPL(ragsr, CUDA, m) {
  m.impl("group_norm_sft_forward", TORCH_BOX(&ragsr::group_norm_sft_forward_cuda));
}
