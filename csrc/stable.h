// The only file that includes PyTorch's stable headers. Kernels see pointers and sizes; the few lines around them that
// know tensors use what is gathered here. Checks that a user can trip over stand in Python (ragsr/ops): the ones here
// guard against a caller that went round it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace ragsr {

using torch::stable::Tensor;
using Scalar = torch::headeronly::ScalarType;

// Fresh memory on the device of `like`. Straight from the shim: the dispatcher would take a microsecond to find it.
inline Tensor empty_strided_on(const Tensor& like, const std::vector<int64_t>& sizes,
                               const std::vector<int64_t>& strides, Scalar dtype) {
  int32_t device = 0, number = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &number));
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle fresh = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), type, device, number, &fresh));
  return Tensor(fresh);
}

inline Tensor empty_on(const Tensor& like, const std::vector<int64_t>& sizes, Scalar dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(1, sizes[d]);
  return empty_strided_on(like, sizes, strides, dtype);
}

// `x` itself where it is contiguous: that too is asked without the dispatcher.
inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// [rows, bytes], uint8, contiguous: what every Hamming kernel reads.
inline Tensor packed_codes(const Tensor& codes) {
  STD_TORCH_CHECK(codes.dim() == 2 && codes.scalar_type() == Scalar::Byte, "codes must be uint8 [rows, bytes]");
  return dense(codes);
}

// Calls f(static_cast<const T*>(nullptr)) with the C++ type of a real dtype; false for one that is not listed.
template <class F>
bool with_type(Scalar dtype, const F& f) {
  switch (dtype) {
#define RAGSR_CASE(T, name) \
  case Scalar::name:        \
    f(static_cast<const T*>(nullptr)); \
    return true;
    RAGSR_CASE(bool, Bool)
    RAGSR_CASE(uint8_t, Byte)
    RAGSR_CASE(int8_t, Char)
    RAGSR_CASE(int16_t, Short)
    RAGSR_CASE(int32_t, Int)
    RAGSR_CASE(int64_t, Long)
    RAGSR_CASE(float, Float)
    RAGSR_CASE(double, Double)
    RAGSR_CASE(torch::headeronly::Half, Half)
    RAGSR_CASE(torch::headeronly::BFloat16, BFloat16)
#undef RAGSR_CASE
    default:
      return false;
  }
}

// The same for the four types that the float ops take; anything else is a caller who went round the checks.
template <class F>
void with_float(Scalar dtype, const F& f) {
  switch (dtype) {
    case Scalar::Float: return f(static_cast<const float*>(nullptr));
    case Scalar::Double: return f(static_cast<const double*>(nullptr));
    case Scalar::Half: return f(static_cast<const torch::headeronly::Half*>(nullptr));
    case Scalar::BFloat16: return f(static_cast<const torch::headeronly::BFloat16*>(nullptr));
    default: STD_TORCH_CHECK(false, "the tensors must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace ragsr
