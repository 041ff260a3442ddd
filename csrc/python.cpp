// The operators without the dispatcher's argument parsing, and what was built.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/utils/python_numbers.h>
#include <torch/csrc/utils/python_symnode.h>
#include <torch/version.h>

#include "autograd.h"
#include "cpu/cpu.h"
#include "kernels/plan.h"
#include "ops.h"

namespace py = pybind11;

namespace lnc {
namespace {

using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, Tensor, Tensor>;

#ifdef LAYERNORM_CUDA_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

// ---- arguments --------------------------------------------------------------------------------------------------

// Without pybind11, whose part of a call is longer than the kernel's on a short row. Each says whether the object is
// what it should be.
bool read(PyObject* object, Tensor& to) {
  if (!THPVariable_Check(object)) return false;
  to = THPVariable_Unpack(object);
  return true;
}

bool read(PyObject* object, OptionalTensor& to) { return object == Py_None || read(object, to.emplace()); }

bool read(PyObject* object, bool& to) {
  to = object == Py_True;
  return PyBool_Check(object);
}

bool read(PyObject* object, double& to) {
  if (!PyFloat_Check(object) && THPVariable_Check(object) && THPVariable_Unpack(object).requires_grad()) return false;
  to = PyFloat_AsDouble(object);
  if (to != -1 || !PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

bool read(PyObject* object, std::optional<ScalarType>& to) {
  if (object == Py_None) return true;
  if (!THPDtype_Check(object)) return false;
  to = reinterpret_cast<THPDtype*>(object)->scalar_type;
  return true;
}

// normalized_shape as PyTorch's own functions take it: a tuple or list of whatever is an index, but no bool; symbolic
// while a compiler traces.
using Shape = c10::SmallVector<c10::SymInt, 4>;

bool read(PyObject* object, c10::SymInt& to) {
  if (PyBool_Check(object)) return false;
  if (!PyLong_CheckExact(object) && torch::is_symint(object)) {
    to = py::handle(object).cast<c10::SymInt>();
    return true;
  }
  const Py_ssize_t value = PyNumber_AsSsize_t(object, PyExc_OverflowError);
  to = c10::SymInt(value);
  if (value != -1 || !PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

// Calls body(item, i) for the items of a tuple or list until it says no.
template <class Body>
bool read_items(PyObject* object, const Body& body) {
  if (!PyTuple_Check(object) && !PyList_Check(object)) return false;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); i++)
    if (!body(PySequence_Fast_GET_ITEM(object, i), i)) return false;
  return true;
}

bool read(PyObject* object, Shape& to) {
  return read_items(object, [&](PyObject* item, Py_ssize_t) { return read(item, to.emplace_back()); });
}

bool read(PyObject* object, std::array<bool, 3>& to) {
  return read_items(object, [&](PyObject* item, Py_ssize_t i) { return i < 3 && read(item, to[i]); }) &&
         PySequence_Fast_GET_SIZE(object) == 3;
}

// ---- the operators ----------------------------------------------------------------------------------------------

// Other threads run Python meanwhile, but not where handing the interpreter over takes as long as the kernel.
template <class Function>
auto without_gil(const Tensor& input, const Function& function) {
  const bool is_short = is_plain(input) && input.is_cpu() && input.numel() <= 1 << 14;
  std::optional<py::gil_scoped_release> no_gil;
  if (!is_short) no_gil.emplace();
  return function();
}

Outputs forward(const Tensor& input, const OptionalTensor& residual, const Shape& normalized_shape,
                const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool rms, bool save_stats,
                const std::optional<ScalarType>& dtype) {
  at::AutoDispatchBelowAutograd below_autograd;
  c10::SymIntArrayRef shape(normalized_shape);
  auto sizes = c10::asIntArrayRefSlowOpt(shape);
  if (sizes && is_plain(input) && is_plain(residual) && is_plain(weight) && is_plain(bias)) {
    RECORD_FUNCTION("layernorm_cuda::norm_forward", recorded(input, residual, *sizes, weight, bias));
    return norm_forward(input, residual, *sizes, weight, bias, eps, rms, save_stats, dtype);
  }
  static const auto op = find_operator<ForwardFunction>("layernorm_cuda::norm_forward");
  return op.call(input, residual, shape, weight, bias, eps, rms, save_stats, dtype);
}

Outputs backward(const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& input,
                 const Shape& normalized_shape, const OptionalTensor& weight, const Tensor& stats, bool rms,
                 const std::array<bool, 3>& output_mask, const std::optional<ScalarType>& bias_dtype) {
  at::AutoDispatchBelowAutograd below_autograd;
  c10::SymIntArrayRef shape(normalized_shape);
  if (auto sizes = c10::asIntArrayRefSlowOpt(shape))
    return call_norm_backward(grad_output, grad_sum, input, *sizes, weight, stats, rms, output_mask, bias_dtype);
  static const auto op = find_operator<BackwardFunction>("layernorm_cuda::norm_backward");
  return op.call(grad_output, grad_sum, input, shape, weight, stats, rms, output_mask, bias_dtype);
}

template <class... Args>
PyObject* call(const char* name, Outputs (*function)(Args...), PyObject* const* objects, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == sizeof...(Args), name, ": expected ", sizeof...(Args), " arguments, got ", count);
  std::tuple<std::decay_t<Args>...> values;
  PyObject* const* object = objects;
  const bool good = std::apply([&](auto&... value) { return (read(*object++, value) && ...); }, values);
  TORCH_CHECK_TYPE(good, name, ": argument ", object - objects, " is of the wrong kind, ",
                   Py_TYPE(object[-1])->tp_name);
  auto [first, second, third] = without_gil(std::get<0>(values), [&] { return std::apply(function, values); });
  THPObjectPtr tuple(PyTuple_New(3));
  if (!tuple) return nullptr;
  PyTuple_SET_ITEM(tuple.get(), 0, THPVariable_Wrap(std::move(first)));
  PyTuple_SET_ITEM(tuple.get(), 1, THPVariable_Wrap(std::move(second)));
  PyTuple_SET_ITEM(tuple.get(), 2, THPVariable_Wrap(std::move(third)));
  return tuple.release();
  END_HANDLE_TH_ERRORS
}

PyObject* norm_forward_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return call("norm_forward", &forward, args, count);
}
PyObject* norm_backward_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return call("norm_backward", &backward, args, count);
}

// ---- norm, for plain tensors ------------------------------------------------------------------------------------

// Neither a subclass nor anything else that might have a __torch_function__; no tangent of forward mode.
bool is_plain_object(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return false;
  const Tensor& t = THPVariable_Unpack(object);
  return is_plain(t) && !t._fw_grad(0).defined();
}

// Autocast gives normalisations of 16-bit CUDA tensors a float32 result; functional.py knows.
bool is_autocast(const Tensor& t) {
  return t.is_cuda() && t.element_size() == 2 && at::autocast::is_autocast_enabled(at::kCUDA);
}

std::optional<c10::SmallVector<int64_t, 4>> plain_sizes(PyObject* object) {
  c10::SmallVector<int64_t, 4> sizes;
  const bool plain = read_items(object, [&](PyObject* item, Py_ssize_t) {
    if (!PyLong_CheckExact(item)) return false;
    sizes.push_back(PyLong_AsLongLong(item));
    if (sizes.back() == -1 && PyErr_Occurred()) throw python_error();
    return true;
  });
  return plain ? std::optional(sizes) : std::nullopt;
}

// The number, or for None, which rms_norm knows, the machine epsilon of the type that is computed in. What PyTorch took
// before 2.7 is left to Python.
std::optional<double> plain_eps(PyObject* eps, bool rms, const Tensor& input, const OptionalTensor& residual) {
  if (PyFloat_Check(eps)) return PyFloat_AS_DOUBLE(eps);
  if (PyLong_CheckExact(eps)) return THPUtils_unpackDouble(eps);
  if (eps != Py_None || !rms) return std::nullopt;
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 7
  return std::nullopt;
#endif
  const bool wide = input.scalar_type() == at::kDouble || (residual && residual->scalar_type() == at::kDouble);
  return wide ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
}

// norm(input, residual, normalized_shape, weight, bias, eps, rms, dtype): the output, with a residual (output, sum),
// differentiable backwards; None where an argument is not plain, be it right or wrong, and Python has to take over.
PyObject* norm_plain(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 8, "norm: expected 8 arguments, got ", count);
  auto is_plain_or_none = [](PyObject* object) { return object == Py_None || is_plain_object(object); };
  if (at::impl::torch_function_mode_enabled() || !is_plain_object(args[0]) || !is_plain_or_none(args[1]) ||
      !is_plain_or_none(args[3]) || !is_plain_or_none(args[4]))
    Py_RETURN_NONE;
  const Tensor& input = THPVariable_Unpack(args[0]);
  OptionalTensor residual, weight, bias;
  bool rms;
  std::optional<ScalarType> dtype;
  if (!read(args[1], residual) || !read(args[3], weight) || !read(args[4], bias) || !read(args[6], rms) ||
      !read(args[7], dtype))
    Py_RETURN_NONE;
  const auto shape = plain_sizes(args[2]);
  const auto eps = plain_eps(args[5], rms, input, residual);
  if (!shape || !eps || (!dtype && is_autocast(input))) Py_RETURN_NONE;
  auto [output, sum] =
      without_gil(input, [&] { return norm(input, residual, *shape, weight, bias, *eps, rms, dtype); });
  THPObjectPtr first(THPVariable_Wrap(std::move(output)));
  if (!sum.defined()) return first.release();
  THPObjectPtr second(THPVariable_Wrap(std::move(sum)));
  return PyTuple_Pack(2, first.get(), second.get());
  END_HANDLE_TH_ERRORS
}

using Call = PyObject*(PyObject*, PyObject* const*, Py_ssize_t);
PyMethodDef method(const char* name, Call* call) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL, nullptr};
}
PyMethodDef kMethods[] = {
    method("norm", &norm_plain),
    method("norm_forward", &norm_forward_call),
    method("norm_backward", &norm_backward_call),
    {},
};

#ifndef LAYERNORM_CUDA_TORCH_VERSION
#define LAYERNORM_CUDA_TORCH_VERSION "unknown"
#endif
#ifndef LAYERNORM_CUDA_CUDA_VERSION
#define LAYERNORM_CUDA_CUDA_VERSION ""
#endif
#ifndef LAYERNORM_CUDA_ARCH_LIST
#define LAYERNORM_CUDA_ARCH_LIST ""
#endif

py::dict build_info() {
  py::dict info;
  info["torch"] = LAYERNORM_CUDA_TORCH_VERSION;
  info["cuda"] = kWithCuda ? py::object(py::str(LAYERNORM_CUDA_CUDA_VERSION)) : py::object(py::none());
  info["cuda_architectures"] = LAYERNORM_CUDA_ARCH_LIST;
  info["cpu_instruction_set"] = cpu::instruction_set();
  return info;
}

py::dict launch_plan(int64_t rows, int64_t cols, const std::string& dtype, bool backward, int arch, int sm_count,
                     bool aligned) {
  const DType type = dtype == "float64"   ? DType::f64
                     : dtype == "float32" ? DType::f32
                     : dtype == "float16" ? DType::f16
                                          : DType::bf16;
  const DeviceTraits device{arch, sm_count};
  const Plan plan =
      backward ? plan_backward(rows, cols, type, device, aligned) : plan_forward(rows, cols, type, device, aligned);
  py::dict d;
  d["tier"] = plan.tier->name;
  d["threads"] = plan.threads;
  d["threads_per_row"] = plan.threads_per_row;
  d["rows_per_block"] = plan.rows_per_block;
  d["packs_per_thread"] = plan.tier->vecs;
  d["blocks"] = plan.blocks_x * plan.blocks_y;
  d["blocks_per_row"] = plan.cluster;
  d["shared_memory"] = plan.shared;
  d["whole_packs"] = plan.whole;
  d["slices"] = plan.slices;
  d["partials"] = plan.partials;
  d["reason"] = plan.tier->reason;
  return d;
}

}  // namespace
}  // namespace lnc

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  m.doc() = "layernorm_cuda's compiled operators";
  if (PyModule_AddFunctions(m.ptr(), lnc::kMethods) < 0) throw py::error_already_set();
  m.def("build_info", lnc::build_info);
  m.def("launch_plan", lnc::launch_plan);
  m.attr("forward_schema") = lnc::kForwardSchema;
  m.attr("backward_schema") = lnc::kBackwardSchema;
}
