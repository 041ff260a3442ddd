// The operators as C++ functions. Outputs that were not asked for are undefined tensors here (None in Python).
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace lnc {

constexpr auto kForwardSchema =
    "norm_forward(Tensor input, Tensor? residual, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, "
    "bool rms, bool save_stats, ScalarType? dtype) -> (Tensor output, Tensor sum, Tensor stats)";
constexpr auto kBackwardSchema =
    "norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor input, SymInt[] normalized_shape, Tensor? weight, "
    "Tensor stats, bool rms, bool[3] output_mask, ScalarType? bias_dtype) -> (Tensor grad_input, Tensor grad_weight, "
    "Tensor grad_bias)";

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_forward(const at::Tensor& input,
                                                            const std::optional<at::Tensor>& residual,
                                                            at::IntArrayRef normalized_shape,
                                                            const std::optional<at::Tensor>& weight,
                                                            const std::optional<at::Tensor>& bias, double eps, bool rms,
                                                            bool save_stats, std::optional<at::ScalarType> dtype);

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_backward(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& grad_sum, const at::Tensor& input,
    at::IntArrayRef normalized_shape, const std::optional<at::Tensor>& weight, const at::Tensor& stats, bool rms,
    std::array<bool, 3> output_mask, std::optional<at::ScalarType> bias_dtype);

// Whether a call may go straight to the kernels: a dense tensor of a device we have kernels for, and no mode (fake
// tensors, functorch, tracing) that would want to see the call in the dispatcher.
bool is_plain(const at::Tensor& t);
inline bool is_plain(const std::optional<at::Tensor>& t) { return !t || is_plain(*t); }

// norm_backward, past the dispatcher where that is allowed: below autograd, on plain tensors.
std::tuple<at::Tensor, at::Tensor, at::Tensor> call_norm_backward(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& grad_sum, const at::Tensor& input,
    at::IntArrayRef normalized_shape, const std::optional<at::Tensor>& weight, const at::Tensor& stats, bool rms,
    std::array<bool, 3> output_mask, std::optional<at::ScalarType> bias_dtype);

// What a call past the dispatcher tells the profiler, beside its name.
template <class... Args>
std::vector<c10::IValue> recorded(const Args&... args) {
  return {c10::IValue(args)...};
}

// The operators through the dispatcher, for tensors and sizes that are not plain.
using ForwardFunction = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor& input, const std::optional<at::Tensor>& residual, c10::SymIntArrayRef normalized_shape,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, double eps, bool rms,
    bool save_stats, std::optional<at::ScalarType> dtype);
using BackwardFunction = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& grad_sum, const at::Tensor& input,
    c10::SymIntArrayRef normalized_shape, const std::optional<at::Tensor>& weight, const at::Tensor& stats, bool rms,
    std::array<bool, 3> output_mask, std::optional<at::ScalarType> bias_dtype);
template <class Function>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Function>();
}

}  // namespace lnc
