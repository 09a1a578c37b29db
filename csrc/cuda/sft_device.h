// The device that sft_plan.h launches on: PyTorch's, on the stream that PyTorch is at.
#pragma once

#include <map>
#include <tuple>
#include <vector>

#include "sft_plan.h"
#include "stream.h"

namespace ragsr::gpu {

inline unsigned grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "group_norm_sft: ", blocks, " blocks are more than a grid holds");
  return static_cast<unsigned>(blocks);
}

class CudaDevice {
 public:
  CudaDevice(const Tensor& like, cudaStream_t stream)
      : like_(like), stream_(stream), index_(like.get_device_index()),
        chip_{static_cast<int>(of(cudaDevAttrMultiProcessorCount)), of(cudaDevAttrMaxSharedMemoryPerBlockOptin),
              of(cudaDevAttrMaxSharedMemoryPerMultiprocessor), of(cudaDevAttrL2CacheSize),
              of(cudaDevAttrClusterLaunch) != 0, of(cudaDevAttrCooperativeLaunch) != 0} {}

  const Chip& chip() const { return chip_; }

  void* lend(int64_t bytes) {
    lent_.push_back(empty_on(like_, {bytes}, Scalar::Byte));
    return lent_.back().mutable_data_ptr();
  }

  void clear(void* memory, int64_t bytes) {
    check_started("group_norm_sft", cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), stream_));
  }

  template <class Kernel, class... Arguments>
  void launch(Kernel kernel, int64_t blocks, int threads, const Arguments&... arguments) {
    kernel<<<grid(blocks), static_cast<unsigned>(threads), 0, stream_>>>(arguments...);
  }

  // Whether the device has room for a team; for all of them, where they must be there at once. Asked once per kind of
  // launch, since the driver takes microseconds to answer.
  template <class Kernel>
  bool takes(Kernel kernel, const Plan& plan) const {
    using Kind = std::tuple<const void*, int, Regime, int64_t, int64_t, int, int64_t>;
    thread_local std::map<Kind, bool> answers;
    const auto function = reinterpret_cast<const void*>(kernel);
    const Kind kind{function, index_, plan.regime, plan.size, plan.blocks, plan.threads, plan.shared};
    const auto known = answers.find(kind);
    if (known != answers.end()) return known->second;
    const bool answer = ask(function, plan);
    cudaGetLastError();  // a question that failed is a no
    return answers[kind] = answer;
  }

  template <class... Parameters, class... Arguments>
  bool launch_team(void (*kernel)(Parameters...), const Plan& plan, const Arguments&... arguments) {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = configuration(plan, attribute);
    if (cudaLaunchKernelEx(&config, kernel, arguments...) == cudaSuccess) return true;
    cudaGetLastError();  // not started: the caller has another way
    return false;
  }

 private:
  int64_t of(cudaDeviceAttr attribute) const {
    int value = 0;
    cudaDeviceGetAttribute(&value, attribute, index_);
    return value;
  }

  cudaLaunchConfig_t configuration(const Plan& plan, cudaLaunchAttribute& attribute) const {
    cudaLaunchConfig_t config{};
    config.gridDim = grid(plan.blocks);
    config.blockDim = static_cast<unsigned>(plan.threads);
    config.dynamicSmemBytes = static_cast<size_t>(plan.shared);
    config.stream = stream_;
    config.attrs = &attribute;
    config.numAttrs = plan.regime == Regime::block ? 0 : 1;
    attribute = {};
    if (plan.regime == Regime::cluster) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(plan.size);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    } else {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    return config;
  }

  bool ask(const void* kernel, const Plan& plan) const {
    // the same for all launches: another thread may be about to launch the kernel
    const auto most = static_cast<int>(chip_.block_shared);
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most) != cudaSuccess) return false;
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = configuration(plan, attribute);
    int count = 0;
    if (plan.regime == Regime::cluster) {
      cudaFuncAttributes compiled;  // for what; the driver may have translated it from something older
      return cudaFuncGetAttributes(&compiled, kernel) == cudaSuccess && compiled.ptxVersion >= 90 &&
             cudaOccupancyMaxActiveClusters(&count, kernel, &config) == cudaSuccess && count > 0;
    }
    const cudaError_t error =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, plan.threads, config.dynamicSmemBytes);
    const int64_t room = int64_t{count} * chip_.processors;
    return error == cudaSuccess && room >= (plan.regime == Regime::grid ? plan.blocks : 1);
  }

  const Tensor& like_;
  cudaStream_t stream_;
  int index_;
  Chip chip_;
  std::vector<Tensor> lent_;
};

}  // namespace ragsr::gpu
