// The operators: checks, allocation and dispatch, once for every backend. A kernel that starts here gets
// arguments that are right; whatever is wrong with them is said before anything is allocated or written.
#include "ops.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include <sstream>
#include <string>

#include "cpu/cpu.h"
#include "kernels/params.h"
#include "memory.h"
#include "parallel.h"
#ifdef LAYERNORM_CUDA_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/launch.h"
#endif

namespace lnc {
namespace {

using at::IntArrayRef;
using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- backends -------------------------------------------------------------------------------------------------

void* data(const Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }

// What at::empty gives, on the CPU without the dispatcher: a call with three results spends more there than in the
// kernel if its rows are few. alike: as many such tensors are wanted together.
Tensor empty(IntArrayRef sizes, const Tensor& like, ScalarType dtype, size_t alike = 1) {
  if (like.is_cpu()) {
    constexpr c10::DispatchKeySet cpu(c10::DispatchKey::CPU);
    const size_t bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * c10::elementSize(dtype);
    return at::detail::empty_generic(sizes, cpu_memory(alike * bytes), cpu, dtype, std::nullopt);
  }
  return at::empty(sizes, like.options().dtype(dtype));
}

// What t.to(dtype) gives; the dispatcher is asked only where there is something to do.
Tensor as(const Tensor& t, ScalarType dtype) { return t.scalar_type() == dtype ? t : t.to(dtype); }

// The backends' functions, by the kind of problem.
template <class Params>
struct Kernels;
template <>
struct Kernels<ForwardParams> {
  static constexpr auto cpu_workspace = &cpu::forward_workspace;
  static constexpr auto cpu = &cpu::forward;
#ifdef LAYERNORM_CUDA_WITH_CUDA
  static constexpr auto cuda_workspace = &cuda::forward_workspace;
  static constexpr auto cuda = &cuda::forward;
#endif
};
template <>
struct Kernels<BackwardParams> {
  static constexpr auto cpu_workspace = &cpu::backward_workspace;
  static constexpr auto cpu = &cpu::backward;
#ifdef LAYERNORM_CUDA_WITH_CUDA
  static constexpr auto cuda_workspace = &cuda::backward_workspace;
  static constexpr auto cuda = &cuda::backward;
#endif
};

template <class Params>
void run(Params& p, const Tensor& input, const char* name) {
  alignas(64) char nearby[32 << 10];  // of a few short rows: a tensor's memory would cost as much as the kernel
  Tensor workspace;
  auto allocate = [&](int64_t bytes) {
    if (bytes == 0) return;
    if (input.is_cpu() && bytes <= int64_t{sizeof nearby}) {
      p.workspace = nearby;
      return;
    }
    workspace = empty({bytes}, input, ScalarType::Byte);
    p.workspace = workspace.data_ptr();
  };
#ifdef LAYERNORM_CUDA_WITH_CUDA
  if (input.is_cuda()) {
    const auto& device = cuda::current_device_traits();
    allocate(Kernels<Params>::cuda_workspace(p, device));
    const cudaError_t status = Kernels<Params>::cuda(p, device, c10::cuda::getCurrentCUDAStream());
    TORCH_CHECK(status == cudaSuccess, name, ": CUDA error: ", cudaGetErrorString(status), " (",
                cudaGetErrorName(status), "). Run with CUDA_LAUNCH_BLOCKING=1 to see which call it belongs to.");
    return;
  }
#endif
  allocate(Kernels<Params>::cpu_workspace(p));
  Kernels<Params>::cpu(p, parallel_for);
}

// The tensor's own device is the current one while its kernels are launched.
struct DeviceGuard {
#ifdef LAYERNORM_CUDA_WITH_CUDA
  c10::cuda::OptionalCUDAGuard guard;
  explicit DeviceGuard(const Tensor& t) {
    if (t.is_cuda()) guard.set_index(t.get_device());
  }
#else
  explicit DeviceGuard(const Tensor&) {}
#endif
};

// ---- dtypes ---------------------------------------------------------------------------------------------------

DType dtype_of(ScalarType t) {
  switch (t) {
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      return DType::f32;
  }
}

bool is_supported(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half || t == ScalarType::Double;
}

ScalarType accumulate_type(ScalarType t) { return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// The dtype in which the kernel reads weight and bias: their own where such a kernel exists, else the
// accumulation type, to which [cols] elements are then converted.
ScalarType param_type(ScalarType input, ScalarType output, std::optional<ScalarType> weight,
                      std::optional<ScalarType> bias) {
  ScalarType wide = accumulate_type(input);
  bool narrow = (!weight || *weight == input) && (!bias || *bias == input) && (weight || bias);
  return narrow && output == input ? input : wide;
}

// ---- shapes ---------------------------------------------------------------------------------------------------

struct Problem {
  const char* name;
  int64_t rows, cols;
  size_t leading;  // number of dimensions before normalized_shape
};

const char* name_of(bool rms, bool residual) {
  return residual ? rms ? "add_rms_norm" : "add_layer_norm" : rms ? "rms_norm" : "layer_norm";
}

Problem check_input(const char* name, const Tensor& input, IntArrayRef shape, bool rms) {
  TORCH_CHECK(!shape.empty(), name, ": expected normalized_shape to have at least one dimension, got ()");
  auto sizes = input.sizes();
  size_t leading = sizes.size() - shape.size();
  auto mismatch = [&] {
    std::ostringstream message;
    message << name << ": given normalized_shape=" << shape << ", expected input with shape [*";
    for (int64_t n : shape) message << ", " << n;
    message << "], but got input of size " << sizes;
    return message.str();
  };
  // rms_norm of PyTorch has an error type of its own for too few dimensions.
  if (rms) TORCH_CHECK_VALUE(sizes.size() >= shape.size(), mismatch());
  TORCH_CHECK(sizes.size() >= shape.size() && sizes.slice(leading) == shape, mismatch());
  TORCH_CHECK_NOT_IMPLEMENTED(is_supported(input.scalar_type()), name, ": not implemented for '",
                              toString(input.scalar_type()),
                              "'; expected input of dtype float64, float32, float16 or bfloat16");
  TORCH_CHECK(input.layout() == at::kStrided, name, ": expected a dense (strided) input, got layout ", input.layout());
  return {name, c10::multiply_integers(sizes.slice(0, leading)), c10::multiply_integers(shape), leading};
}

void check_param(const Problem& p, const char* what, const OptionalTensor& t, const Tensor& input, IntArrayRef shape) {
  if (!t) return;
  TORCH_CHECK(t->sizes() == shape, p.name, ": ", what, " has shape ", t->sizes(), ", expected ", shape,
              " to match normalized_shape");
  TORCH_CHECK(t->device() == input.device(), p.name, ": ", what, " is on ", t->device(),
              ", expected all tensors to be on the same device as input, ", input.device());
  TORCH_CHECK_NOT_IMPLEMENTED(is_supported(t->scalar_type()), p.name, ": not implemented for '",
                              toString(t->scalar_type()), "'; expected ", what,
                              " of dtype float64, float32, float16 or bfloat16");
}

void check_like_input(const Problem& p, const char* what, const Tensor& t, const Tensor& input) {
  TORCH_CHECK(t.sizes() == input.sizes(), p.name, ": ", what, " has shape ", t.sizes(), ", expected ", input.sizes(),
              " to match input");
  TORCH_CHECK(t.device() == input.device(), p.name, ": ", what, " is on ", t.device(),
              ", expected all tensors to be on the same device as input, ", input.device());
}

// A tensor of whose rows the kernel can walk, and how it does: the tensor itself when the elements of a row are
// adjacent and its leading dimensions fold into two strides, else a contiguous copy.
struct Rows {
  Tensor tensor;
  RowMap map;
};

Rows rows_of(const Tensor& t, const Problem& p) {
  if (t.is_contiguous()) return {t, RowMap::contiguous(p.rows, p.cols)};
  auto sizes = t.sizes();
  auto strides = t.strides();
  auto copy = [&] { return Rows{t.contiguous(), RowMap::contiguous(p.rows, p.cols)}; };
  int64_t adjacent = 1;
  for (size_t d = sizes.size(); d-- > p.leading;) {
    if (sizes[d] != 1 && strides[d] != adjacent) return copy();
    adjacent *= sizes[d];
  }
  int64_t size[2] = {1, 1}, stride[2] = {p.cols, 0};
  int level = -1;
  for (size_t d = p.leading; d-- > 0;) {
    if (sizes[d] == 1) continue;
    if (level >= 0 && strides[d] == size[level] * stride[level]) {
      size[level] *= sizes[d];
    } else {
      if (++level == 2 || (level == 1 && p.rows > UINT32_MAX)) return copy();
      size[level] = sizes[d];
      stride[level] = strides[d];
    }
  }
  return {t, {size[0], stride[0], stride[1]}};
}

// Weight or bias as the kernels read it.
Tensor param_as(const Tensor& t, ScalarType dtype) {
  Tensor p = as(t, dtype).contiguous();
  return reinterpret_cast<uintptr_t>(p.data_ptr()) % 16 == 0 ? p : p.clone();
}

}  // namespace

// ---- forward and backward -------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> norm_forward(const Tensor& input_, const OptionalTensor& residual_,
                                                IntArrayRef normalized_shape, const OptionalTensor& weight,
                                                const OptionalTensor& bias, double eps, bool rms, bool save_stats,
                                                std::optional<ScalarType> dtype) {
  Problem p = check_input(name_of(rms, residual_.has_value()), input_, normalized_shape, rms);
  check_param(p, "weight", weight, input_, normalized_shape);
  check_param(p, "bias", bias, input_, normalized_shape);
  Tensor input = input_, residual;
  if (residual_) {
    check_like_input(p, "residual", *residual_, input_);
    TORCH_CHECK_NOT_IMPLEMENTED(is_supported(residual_->scalar_type()), p.name, ": not implemented for '",
                                toString(residual_->scalar_type()), "'");
    auto wider = c10::promoteTypes(input.scalar_type(), residual_->scalar_type());
    input = as(input, wider);
    residual = as(*residual_, wider);
  }
  ScalarType type = input.scalar_type(), wide = accumulate_type(type), output_type = dtype.value_or(type);
  TORCH_CHECK(output_type == type || output_type == wide, p.name, ": output dtype ", output_type, " for input of ",
              type, "; expected ", type, " or ", wide);
  auto type_of = [](const OptionalTensor& t) { return t ? std::optional(t->scalar_type()) : std::nullopt; };
  ScalarType params = param_type(type, output_type, type_of(weight), type_of(bias));

  DeviceGuard guard(input);
  Rows x = rows_of(input, p), r;
  if (residual.defined()) r = rows_of(residual, p);
  Tensor w = weight ? param_as(*weight, params) : Tensor(), b = bias ? param_as(*bias, params) : Tensor();
  const size_t alike = residual.defined() ? 2 : 1;
  Tensor output = empty(input.sizes(), input, output_type, alike), sum, stats;
  if (residual.defined()) sum = empty(input.sizes(), input, type, alike);
  if (save_stats) stats = empty({rms ? 1 : 2, p.rows}, input, wide);
  if (output.numel() == 0) return {output, sum, stats};

  ForwardParams params_{};
  params_.input = data(x.tensor);
  params_.residual = data(r.tensor);
  params_.weight = data(w);
  params_.bias = data(b);
  params_.output = data(output);
  params_.sum = data(sum);
  params_.stats = data(stats);
  params_.input_rows = x.map;
  params_.residual_rows = r.map;
  params_.rows = p.rows;
  params_.cols = p.cols;
  params_.eps = eps;
  params_.dtype = dtype_of(type);
  params_.param_dtype = dtype_of(params);
  params_.output_dtype = dtype_of(output_type);
  params_.norm = rms ? Norm::rms : Norm::layer;
  run(params_, input, p.name);
  return {output, sum, stats};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& grad_output, const OptionalTensor& grad_sum,
                                                 const Tensor& input, IntArrayRef normalized_shape,
                                                 const OptionalTensor& weight, const Tensor& stats, bool rms,
                                                 std::array<bool, 3> output_mask,
                                                 std::optional<ScalarType> bias_dtype) {
  Problem p = check_input(rms ? "rms_norm_backward" : "layer_norm_backward", input, normalized_shape, rms);
  check_param(p, "weight", weight, input, normalized_shape);
  check_like_input(p, "grad_output", grad_output, input);
  if (grad_sum) check_like_input(p, "grad_sum", *grad_sum, input);
  ScalarType type = input.scalar_type(), wide = accumulate_type(type);
  TORCH_CHECK(
      stats.scalar_type() == wide && stats.numel() == (rms ? 1 : 2) * p.rows && stats.device() == input.device(),
      p.name, ": stats must be what the forward saved: ", wide, " of shape [", rms ? 1 : 2, ", ", p.rows, "] on ",
      input.device());
  TORCH_CHECK(!output_mask[1] || weight, p.name, ": a gradient of weight was asked for but there is no weight");
  ScalarType output_type = grad_output.scalar_type() == wide ? wide : type;
  auto weight_dtype = weight ? std::optional(weight->scalar_type()) : std::nullopt;
  if (!bias_dtype) bias_dtype = weight_dtype.value_or(wide);
  ScalarType params = param_type(type, output_type, weight_dtype, output_mask[2] ? bias_dtype : std::nullopt);

  DeviceGuard guard(input);
  Rows x = rows_of(input, p), dy = rows_of(as(grad_output, output_type), p), ds;
  if (grad_sum && output_mask[0]) ds = rows_of(as(*grad_sum, type), p);
  Tensor w = weight ? param_as(*weight, params) : Tensor(), saved = stats.contiguous();
  Tensor dx, dw, db;
  if (output_mask[0]) dx = empty(input.sizes(), input, type);
  if (output_mask[1]) dw = empty(normalized_shape, input, params);
  if (output_mask[2]) db = empty(normalized_shape, input, params);
  if (input.numel() == 0) {
    if (dw.defined()) dw.zero_();
    if (db.defined()) db.zero_();
  } else if (output_mask[0] || output_mask[1] || output_mask[2]) {
    BackwardParams params_{};
    params_.grad_output = data(dy.tensor);
    params_.grad_sum = data(ds.tensor);
    params_.input = data(x.tensor);
    params_.weight = data(w);
    params_.stats = data(saved);
    params_.grad_input = data(dx);
    params_.grad_weight = data(dw);
    params_.grad_bias = data(db);
    params_.grad_output_rows = dy.map;
    params_.grad_sum_rows = ds.map;
    params_.input_rows = x.map;
    params_.rows = p.rows;
    params_.cols = p.cols;
    params_.dtype = dtype_of(type);
    params_.param_dtype = dtype_of(params);
    params_.output_dtype = dtype_of(output_type);
    params_.norm = rms ? Norm::rms : Norm::layer;
    run(params_, input, p.name);
  }
  if (dw.defined()) dw = as(dw, *weight_dtype);
  if (db.defined()) db = as(db, *bias_dtype);
  return {dx, dw, db};
}

// ---- past the dispatcher --------------------------------------------------------------------------------------

bool is_plain(const Tensor& t) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet transparent{DispatchKey::Dense,         DispatchKey::AutogradFunctionality,
                                            DispatchKey::AutocastCPU,   DispatchKey::AutocastCUDA,
                                            DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView};
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  auto opaque = (t.key_set() | tls.included_) - tls.excluded_ - transparent;
#ifdef LAYERNORM_CUDA_WITH_CUDA
  const bool ours = t.is_cpu() || t.is_cuda();
#else
  const bool ours = t.is_cpu();
#endif
  return (opaque.raw_repr() & ~c10::full_backend_mask) == 0 && ours;
}

std::tuple<Tensor, Tensor, Tensor> call_norm_backward(const Tensor& grad_output, const OptionalTensor& grad_sum,
                                                      const Tensor& input, IntArrayRef normalized_shape,
                                                      const OptionalTensor& weight, const Tensor& stats, bool rms,
                                                      std::array<bool, 3> output_mask,
                                                      std::optional<ScalarType> bias_dtype) {
  const bool below_autograd = c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::AutogradFunctionality);
  if (below_autograd && is_plain(grad_output) && is_plain(grad_sum) && is_plain(input) && is_plain(weight) &&
      is_plain(stats)) {
    RECORD_FUNCTION("layernorm_cuda::norm_backward",
                    recorded(grad_output, grad_sum, input, normalized_shape, weight, stats));
    return norm_backward(grad_output, grad_sum, input, normalized_shape, weight, stats, rms, output_mask, bias_dtype);
  }
  static const auto op = find_operator<BackwardFunction>("layernorm_cuda::norm_backward");
  return op.call(grad_output, grad_sum, input, c10::fromIntArrayRefSlow(normalized_shape), weight, stats, rms,
                 output_mask, bias_dtype);
}

// ---- registration ---------------------------------------------------------------------------------------------

namespace {

// The dispatcher's operators return a tensor for every output: of no elements where nothing was asked for.
std::tuple<Tensor, Tensor, Tensor> defined(std::tuple<Tensor, Tensor, Tensor> outputs, const Tensor& like) {
  auto fill = [&](Tensor& t) {
    if (!t.defined()) t = empty({0}, like, like.scalar_type());
  };
  std::apply([&](auto&... t) { (fill(t), ...); }, outputs);
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor> forward_op(const Tensor& input, const OptionalTensor& residual,
                                              IntArrayRef normalized_shape, const OptionalTensor& weight,
                                              const OptionalTensor& bias, double eps, bool rms, bool save_stats,
                                              std::optional<ScalarType> dtype) {
  return defined(norm_forward(input, residual, normalized_shape, weight, bias, eps, rms, save_stats, dtype), input);
}

std::tuple<Tensor, Tensor, Tensor> backward_op(const Tensor& grad_output, const OptionalTensor& grad_sum,
                                               const Tensor& input, IntArrayRef normalized_shape,
                                               const OptionalTensor& weight, const Tensor& stats, bool rms,
                                               std::array<bool, 3> output_mask, std::optional<ScalarType> bias_dtype) {
  return defined(
      norm_backward(grad_output, grad_sum, input, normalized_shape, weight, stats, rms, output_mask, bias_dtype),
      input);
}

TORCH_LIBRARY(layernorm_cuda, m) {
  for (const std::string schema : {kForwardSchema, kBackwardSchema}) {
    m.def(schema.c_str(), {at::Tag::pt2_compliant_tag});
    m.def(("differentiable_" + schema).c_str());  // implemented in functions.py
  }
}

void register_kernels(torch::Library& m) {
  m.impl("norm_forward", forward_op);
  m.impl("norm_backward", backward_op);
}

TORCH_LIBRARY_IMPL(layernorm_cuda, CPU, m) { register_kernels(m); }
#ifdef LAYERNORM_CUDA_WITH_CUDA
TORCH_LIBRARY_IMPL(layernorm_cuda, CUDA, m) { register_kernels(m); }
#endif

}  // namespace
}  // namespace lnc
