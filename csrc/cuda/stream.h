// The stream that PyTorch is at, and whether what was sent there has started.
#pragma once

#include <cuda_runtime.h>

#include "../stable.h"

namespace ragsr {

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_started(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": a kernel did not start: ", cudaGetErrorString(error));
}

}  // namespace ragsr
