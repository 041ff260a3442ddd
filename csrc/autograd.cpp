#include "autograd.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>
#include <torch/version.h>

#include "ops.h"

namespace lnc {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using NodePtr = decltype(torch::autograd::Edge::function);

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

bool has_tangent(const Tensor& t) { return t.defined() && t._fw_grad(0).defined(); }

bool requires_grad(const OptionalTensor& t) { return t && t->requires_grad(); }

// What backward knows besides tensors.
struct Facts {
  std::vector<int64_t> shape;
  bool rms, has_sum, saved;  // has_sum: the node has a second output, the sum of input and residual
  std::optional<at::ScalarType> bias_dtype;
};

// Of input, residual, weight and bias, as far as they are wanted. x: the input, or its sum with the residual.
variable_list gradients(const variable_list& grads, const Tensor& x, const Tensor& weight, const Tensor& stats,
                        const Facts& facts, const std::array<bool, 4>& wanted) {
  const auto [for_input, for_residual, for_weight, for_bias] = wanted;
  const Tensor& grad_output = grads[0];
  const Tensor grad_sum = facts.has_sum ? grads[1] : Tensor();
  Tensor dx, dw, db;
  if (!grad_output.defined()) {
    dx = grad_sum;
  } else if (!facts.saved) {
    const Tensor wide = grad_output.to(grad_output.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
    db = wide.sum_to_size(facts.shape);
  } else {
    // With create_graph, or a tangent, the operator's own derivative, registered in functions.py, is wanted too.
    std::optional<at::AutoDispatchBelowAutograd> below_autograd;
    if (!at::GradMode::is_enabled() && !has_tangent(grad_output) && !has_tangent(grad_sum)) below_autograd.emplace();
    std::tie(dx, dw, db) = call_norm_backward(grad_output, optional(grad_sum), x, facts.shape, optional(weight), stats,
                                              facts.rms, {for_input || for_residual, for_weight, for_bias},
                                              for_bias ? facts.bias_dtype : std::nullopt);
  }
  auto only = [](bool asked, const Tensor& t) { return asked ? t : Tensor(); };
  return {only(for_input, dx), only(for_residual, dx), only(for_weight, dw), only(for_bias, db)};
}

// A node of the graph of its own, rather than torch::autograd::Function's: its containers and checks cost more than the
// kernel does on a short row.
struct NormBackward : Node {
  SavedVariable x, weight, stats;
  Facts facts;

  std::string name() const override { return "NormBackward"; }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!facts.saved || !grads[0].defined()) return gradients(grads, {}, {}, {}, facts, wanted());
    return gradients(grads, x.unpack(getptr()), weight.unpack(), stats.unpack(), facts, wanted());
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* t : {&x, &weight, &stats}) t->reset_data();
  }

  std::array<bool, 4> wanted() const {
    return {task_should_compute_output(0), task_should_compute_output(1), task_should_compute_output(2),
            task_should_compute_output(3)};
  }

#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 8
  // Compiled autograd calls gradients() with tensors that stand for the saved ones.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(x, facts.has_sum);
    args.collect(weight, false);
    args.collect(stats, false);
    args.collect(facts.shape);
    args.collect(facts.bias_dtype);
    for (bool fact : {facts.rms, facts.has_sum, facts.saved}) args.collect(fact);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override {
    using namespace torch::dynamo::autograd;
    for (SavedVariable* t : {&x, &weight, &stats}) saved.before(*t);
    PackedArgs args;
    args.pack(facts.saved ? x.unpack(getptr()) : Tensor());
    args.pack(weight.unpack());
    args.pack(stats.unpack());
    args.pack(facts.shape);
    for (bool fact : {facts.rms, facts.has_sum, facts.saved}) args.pack(fact);
    args.pack(facts.bias_dtype);
    for (bool asked : wanted()) args.pack(asked);
    for (SavedVariable* t : {&x, &weight, &stats}) saved.after(*t);
    std::vector<at::TypePtr> schema;
    for (const auto& arg : args.vec()) schema.push_back(arg.isTensor() ? at::TensorType::get() : arg.type());
    const auto& interface = getPyCompilerInterface();
    const auto function =
        interface->bind_function(saved.get_py_compiler(), name(), &packed_gradients, schema, true, false);
    return interface->call_function(saved.get_py_compiler(), "apply_functional", function, grads, args.vec(),
                                    IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
                                        get_input_metadata(next_edges())));
  }

  static variable_list packed_gradients(const variable_list& grads, const std::vector<at::IValue>& packed) {
    torch::dynamo::autograd::PackedArgs args(packed);
    const auto x = args.unpack<Tensor>(), weight = args.unpack<Tensor>(), stats = args.unpack<Tensor>();
    Facts facts;
    facts.shape = args.unpack<std::vector<int64_t>>();
    for (bool* fact : {&facts.rms, &facts.has_sum, &facts.saved}) *fact = args.unpack<bool>();
    facts.bias_dtype = args.unpack<std::optional<at::ScalarType>>();
    std::array<bool, 4> wanted;
    for (bool& asked : wanted) asked = args.unpack<bool>();
    return gradients(grads, x, weight, stats, facts, wanted);
  }
#endif
};

// Nodes count their references themselves in newer versions of PyTorch.
template <class N>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, N>)
    return c10::make_intrusive<N>();
  else
    return std::shared_ptr<N>(new N, [](N* node) { deleteNode(node); });
}

}  // namespace

std::pair<Tensor, Tensor> norm(const Tensor& input, const OptionalTensor& residual, at::IntArrayRef normalized_shape,
                               const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool rms,
                               std::optional<at::ScalarType> dtype) {
  const bool save = input.requires_grad() || requires_grad(residual) || requires_grad(weight);
  const bool differentiable = at::GradMode::is_enabled() && (save || requires_grad(bias));
  std::tuple<Tensor, Tensor, Tensor> outputs;
  {
    at::AutoDispatchBelowAutograd below_autograd;
    RECORD_FUNCTION("layernorm_cuda::norm_forward", recorded(input, residual, normalized_shape, weight, bias));
    outputs = norm_forward(input, residual, normalized_shape, weight, bias, eps, rms, differentiable && save, dtype);
  }
  auto& [output, sum, stats] = outputs;
  if (differentiable) {
    auto node = make_node<NormBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(input, residual, weight, bias));
    const bool has_sum = residual && (input.requires_grad() || residual->requires_grad());  // no parameter is in it
    node->facts = {normalized_shape.vec(), rms, has_sum, save,
                   bias ? std::optional(bias->scalar_type()) : std::nullopt};
    const NodePtr history = node;
    torch::autograd::set_history(output, history);
    if (has_sum) torch::autograd::set_history(sum, history);
    if (save) {  // the gradient of bias alone needs nothing but the upstream gradient
      node->x = SavedVariable(residual ? sum : input, has_sum);
      node->weight = SavedVariable(weight, false);
      node->stats = SavedVariable(stats, false);
    }
  }
  return {std::move(output), std::move(sum)};
}

// ---- the operators --------------------------------------------------------------------------------------------

namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

template <class T>
bool needs_derivative(const T& argument) {
  if constexpr (std::is_same_v<T, Tensor>)
    return (at::GradMode::is_enabled() && argument.requires_grad()) || has_tangent(argument);
  else if constexpr (std::is_same_v<T, OptionalTensor>)
    return argument && needs_derivative(*argument);
  else
    return false;
}

// A compiled graph's calls mostly need no derivative any more, and then Python, which has them, would cost more than
// the kernel does on a short row.
template <class Op, class... Args>
Outputs differentiable(const Op& op, const Op& in_python, c10::DispatchKeySet keys, const Args&... args) {
  if ((needs_derivative(args) || ...)) return in_python.call(args...);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.redispatch(keys & c10::after_autograd_keyset, args...);
}

Outputs forward_op(c10::DispatchKeySet keys, const Tensor& input, const OptionalTensor& residual,
                   c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight, const OptionalTensor& bias,
                   double eps, bool rms, bool save_stats, std::optional<at::ScalarType> dtype) {
  static const auto op = find_operator<ForwardFunction>("layernorm_cuda::norm_forward");
  static const auto in_python = find_operator<ForwardFunction>("layernorm_cuda::differentiable_norm_forward");
  return differentiable(op, in_python, keys, input, residual, normalized_shape, weight, bias, eps, rms, save_stats,
                        dtype);
}

Outputs backward_op(c10::DispatchKeySet keys, const Tensor& grad_output, const OptionalTensor& grad_sum,
                    const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                    const Tensor& stats, bool rms, std::array<bool, 3> output_mask,
                    std::optional<at::ScalarType> bias_dtype) {
  static const auto op = find_operator<BackwardFunction>("layernorm_cuda::norm_backward");
  static const auto in_python = find_operator<BackwardFunction>("layernorm_cuda::differentiable_norm_backward");
  return differentiable(op, in_python, keys, grad_output, grad_sum, input, normalized_shape, weight, stats, rms,
                        output_mask, bias_dtype);
}

TORCH_LIBRARY_IMPL(layernorm_cuda, Autograd, m) {
  m.impl("norm_forward", TORCH_FN(forward_op));
  m.impl("norm_backward", TORCH_FN(backward_op));
}

}  // namespace
}  // namespace lnc
