#include "autograd.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops.h"

namespace lnc {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

bool requires_grad(const OptionalTensor& t) { return t && t->requires_grad(); }

// What backward needs besides tensors, as one list of integers: these, then normalized_shape.
enum Fact { kRms, kResidual, kWeight, kBias, kBiasDtype, kSaved, kFacts };

struct NormNode : torch::autograd::Function<NormNode> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& residual,
                               const OptionalTensor& weight, const OptionalTensor& bias, at::IntArrayRef shape,
                               double eps, bool rms, std::optional<at::ScalarType> dtype, bool save) {
    at::AutoDispatchBelowAutograd below_autograd;
    auto [output, sum, stats] = norm_forward(input, residual, shape, weight, bias, eps, rms, save, dtype);
    // The gradient of bias alone needs nothing but the upstream gradient.
    if (save) ctx->save_for_backward({residual ? sum : input, weight ? *weight : Tensor(), stats});
    std::vector<int64_t> facts = {rms,
                                  residual.has_value(),
                                  weight.has_value(),
                                  bias.has_value(),
                                  bias ? static_cast<int64_t>(bias->scalar_type()) : 0,
                                  save};
    facts.insert(facts.end(), shape.begin(), shape.end());
    ctx->saved_data[""] = std::move(facts);
    ctx->set_materialize_grads(false);
    return residual ? variable_list{output, sum} : variable_list{output};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto facts = ctx->saved_data[""].toIntVector();
    const at::IntArrayRef shape(facts.data() + kFacts, facts.size() - kFacts);
    size_t edge = 0;
    auto wanted = [&](bool present) { return present && ctx->needs_input_grad(edge++); };
    const bool for_input = wanted(true), for_residual = wanted(facts[kResidual]), for_weight = wanted(facts[kWeight]),
               for_bias = wanted(facts[kBias]);
    const Tensor& grad_output = grads[0];
    const Tensor grad_sum = facts[kResidual] ? grads[1] : Tensor();
    Tensor dx, dw, db;
    if (!grad_output.defined()) {
      dx = grad_sum;
    } else if (!facts[kSaved]) {
      const Tensor wide = grad_output.to(grad_output.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
      db = wide.reshape({-1, c10::multiply_integers(shape)}).sum(0).reshape(shape);
    } else {
      const variable_list saved = ctx->get_saved_variables();
      const std::array<bool, 3> mask = {for_input || for_residual, for_weight, for_bias};
      const auto bias_dtype = for_bias ? std::optional(static_cast<at::ScalarType>(facts[kBiasDtype])) : std::nullopt;
      // With create_graph the operator's own derivative, registered in functions.py, is wanted too.
      std::optional<at::AutoDispatchBelowAutograd> below_autograd;
      if (!at::GradMode::is_enabled()) below_autograd.emplace();
      std::tie(dx, dw, db) = call_norm_backward(grad_output, optional(grad_sum), saved[0], shape, optional(saved[1]),
                                                saved[2], facts[kRms], mask, bias_dtype);
    }
    auto only = [](bool asked, const Tensor& t) { return asked ? t : Tensor(); };
    return {only(for_input, dx), only(for_residual, dx), only(for_weight, dw), only(for_bias, db), {}, {}, {}, {}, {}};
  }
};

}  // namespace

std::pair<Tensor, Tensor> norm(const Tensor& input, const OptionalTensor& residual, at::IntArrayRef normalized_shape,
                               const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool rms,
                               std::optional<at::ScalarType> dtype) {
  const bool save = input.requires_grad() || requires_grad(residual) || requires_grad(weight);
  if (at::GradMode::is_enabled() && (save || requires_grad(bias))) {
    variable_list out = NormNode::apply(input, residual, weight, bias, normalized_shape, eps, rms, dtype, save);
    return {out[0], residual ? out[1] : Tensor()};
  }
  at::AutoDispatchBelowAutograd below_autograd;
  auto [output, sum, stats] = norm_forward(input, residual, normalized_shape, weight, bias, eps, rms, false, dtype);
  return {output, sum};
}

}  // namespace lnc
