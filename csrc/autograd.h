// The differentiable operator for plain tensors, below Python: what NormFunction (layernorm_cuda/functions.py) does
// for everyone, without Python's share of the time, which is more than the kernel's on short inputs.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>

namespace lnc {

// (output, sum); sum is undefined without a residual. All tensors must be plain (python.cpp: is_plain).
std::pair<at::Tensor, at::Tensor> norm(const at::Tensor& input, const std::optional<at::Tensor>& residual,
                                       at::IntArrayRef normalized_shape, const std::optional<at::Tensor>& weight,
                                       const std::optional<at::Tensor>& bias, double eps, bool rms,
                                       std::optional<at::ScalarType> dtype);

}  // namespace lnc
