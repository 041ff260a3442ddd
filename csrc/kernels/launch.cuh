// From a plan to a launch. Included by the translation units that instantiate kernels.
#pragma once
#include "backward.cuh"
#include "forward.cuh"
#include "launch.h"

namespace lnc::cuda {

// The one place where kernels start: in tests/host it runs them on the CPU.
template <class Args>
cudaError_t launch_kernel(void (*kernel)(Args), dim3 grid, dim3 block, cudaStream_t stream, const Args& args) {
#ifdef LNC_HOST_EXECUTION
  return lnc::host::launch(kernel, grid, block, 0, 1, stream, args);
#else
  void* list[] = {const_cast<Args*>(&args)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, list, 0, stream);
#endif
}

inline dim3 grid_of(const Plan& plan) {
  return dim3(static_cast<unsigned>(plan.blocks_x), static_cast<unsigned>(plan.blocks_y));
}

template <class T>
ForwardArgs forward_args(const ForwardParams& p, const Plan& plan) {
  using A = Accumulate<T>;
  ForwardArgs a{};
  a.p = p;
  a.threads_per_row = plan.threads_per_row;
  a.even = int64_t(plan.threads_per_row) * plan.tier->vecs * kPack<T> == p.cols;
  const RowMap dense = RowMap::contiguous(p.rows, p.cols);
  a.wide_params = sizeof(T) < sizeof(A) && p.param_dtype == accumulate_type(p.dtype);
  a.wide_output = sizeof(T) < sizeof(A) && p.output_dtype == accumulate_type(p.dtype);
  a.input_aligned = is_aligned(p.input, p.input_rows, p.rows, sizeof(T));
  a.residual_aligned = is_aligned(p.residual, p.residual_rows, p.rows, sizeof(T));
  a.sum_aligned = is_aligned(p.sum, dense, p.rows, sizeof(T));
  a.output_aligned = is_aligned(p.output, dense, p.rows, size_of(p.output_dtype));
  a.inverse_cols = 1.0 / double(p.cols);
  a.slice_cols = plan.slice_cols;
  a.slices = plan.slices;
  return a;
}

template <class T, Norm norm, int SIZE, int VECS>
cudaError_t launch_forward_rows(const ForwardArgs& args, const Plan& plan, cudaStream_t stream) {
  return launch_kernel(forward_rows<T, norm, SIZE, VECS>, grid_of(plan), dim3(plan.threads), stream, args);
}

template <class T, Norm norm>
cudaError_t launch_forward_norm(const ForwardParams& p, const Plan& plan, cudaStream_t stream) {
  const ForwardArgs args = forward_args<T>(p, plan);
  constexpr bool wide = sizeof(T) >= 4;  // the tiers of 6 and 8 packs are for these
  const int vecs = plan.tier->vecs;
  if (plan.is_sliced()) {
    cudaError_t status =
        launch_kernel(forward_slice_moments<T, norm, 4>, grid_of(plan), dim3(plan.threads), stream, args);
    if (status != cudaSuccess) return status;
    return launch_kernel(forward_slices<T, norm, 4>, grid_of(plan), dim3(plan.threads), stream, args);
  }
  switch (plan.tier->group) {
    case 1:
      return launch_forward_rows<T, norm, 1, 1>(args, plan, stream);
    case 4:
      return launch_forward_rows<T, norm, 4, 1>(args, plan, stream);
    case 16:
      return launch_forward_rows<T, norm, 16, 1>(args, plan, stream);
    case 32:
      if (vecs == 1) return launch_forward_rows<T, norm, 32, 1>(args, plan, stream);
      if (vecs == 2) return launch_forward_rows<T, norm, 32, 2>(args, plan, stream);
      if (vecs == 3) return launch_forward_rows<T, norm, 32, 3>(args, plan, stream);
      if (vecs == 4) return launch_forward_rows<T, norm, 32, 4>(args, plan, stream);
      if constexpr (wide) {
        if (vecs == 6) return launch_forward_rows<T, norm, 32, 6>(args, plan, stream);
        if (vecs == 8) return launch_forward_rows<T, norm, 32, 8>(args, plan, stream);
      }
      break;
    case kWholeWarps:
      if (vecs == 4) return launch_forward_rows<T, norm, kWarps, 4>(args, plan, stream);
      if constexpr (wide)
        return launch_forward_rows<T, norm, kWarps, 8>(args, plan, stream);
      else
        return launch_forward_rows<T, norm, kWarps, 2>(args, plan, stream);
  }
  return cudaErrorInvalidConfiguration;
}

template <class T>
cudaError_t launch_forward(const ForwardParams& p, const Plan& plan, cudaStream_t stream) {
  return p.norm == Norm::layer ? launch_forward_norm<T, Norm::layer>(p, plan, stream)
                               : launch_forward_norm<T, Norm::rms>(p, plan, stream);
}

template <class T, class D>
BackwardArgs backward_args(const BackwardParams& p, const Plan& plan) {
  using A = Accumulate<T>;
  BackwardArgs a{};
  a.p = p;
  a.threads_per_row = plan.threads_per_row;
  a.wide_params = sizeof(T) < sizeof(A) && p.param_dtype == accumulate_type(p.dtype);
  a.param_grads = p.grad_weight || p.grad_bias;
  a.input_aligned = is_aligned(p.input, p.input_rows, p.rows, sizeof(T));
  a.grad_output_aligned = is_aligned(p.grad_output, p.grad_output_rows, p.rows, sizeof(D));
  a.all_aligned = a.input_aligned && a.grad_output_aligned;
  a.grad_sum_aligned = is_aligned(p.grad_sum, p.grad_sum_rows, p.rows, sizeof(T));
  a.grad_input_aligned = is_aligned(p.grad_input, RowMap::contiguous(p.rows, p.cols), p.rows, sizeof(T));
  a.inverse_cols = 1.0 / double(p.cols);
  a.slice_cols = plan.slice_cols;
  a.slices = plan.slices;
  a.row_blocks = plan.partials;
  a.partials = p.workspace;
  a.sums = static_cast<char*>(p.workspace) + partials_bytes(p, plan);
  return a;
}

template <class T, class D, Norm norm>
cudaError_t launch_backward_rows(const BackwardArgs& args, const Plan& plan, cudaStream_t stream) {
  auto launch = [&](void (*kernel)(BackwardArgs)) {
    return launch_kernel(kernel, grid_of(plan), dim3(plan.threads), stream, args);
  };
  if (plan.is_sliced()) {
    if (args.p.grad_input) {
      dim3 every_row(plan.slices, at_most(args.p.rows, kMaxGridY));
      cudaError_t status =
          launch_kernel(backward_slice_sums<T, D, norm, 2>, every_row, dim3(plan.threads), stream, args);
      if (status != cudaSuccess) return status;
    }
    return launch(backward_slices<T, D, norm, 2>);
  }
  constexpr bool wide = sizeof(T) >= 4;
  const int vecs = plan.tier->vecs;
  switch (plan.tier->group) {
    case 1:
      return launch(backward_rows<T, D, norm, 1, 1, 512, true>);
    case 4:
      return launch(backward_rows<T, D, norm, 4, 1, 512, true>);
    case 16:
      return launch(backward_rows<T, D, norm, 16, 1, 512, true>);
    case 32:
      if (vecs == 1) return launch(backward_rows<T, D, norm, 32, 1, 512, true>);
      if constexpr (wide) return launch(backward_rows<T, D, norm, 32, 2, 512, true>);
      break;
    case kWholeWarps:
      if constexpr (wide) {
        return launch(backward_rows<T, D, norm, kWarps, 2, 512, true>);
      } else {
        if (vecs == 1) return launch(backward_rows<T, D, norm, kWarps, 1, 512, true>);
        return launch(backward_rows<T, D, norm, kWarps, 2, 512, false>);
      }
  }
  return cudaErrorInvalidConfiguration;
}

template <class A, class P>
cudaError_t launch_fold(const BackwardArgs& args, cudaStream_t stream) {
  return launch_kernel(fold_partials<A, P>, dim3(ceil_div(args.p.cols, 32), 2), dim3(32 * kFoldWarps), stream, args);
}

template <class T, class D>
cudaError_t launch_backward(const BackwardParams& p, const Plan& plan, cudaStream_t stream) {
  using A = Accumulate<T>;
  const BackwardArgs args = backward_args<T, D>(p, plan);
  const cudaError_t status = p.norm == Norm::layer ? launch_backward_rows<T, D, Norm::layer>(args, plan, stream)
                                                   : launch_backward_rows<T, D, Norm::rms>(args, plan, stream);
  if (status != cudaSuccess || !args.param_grads) return status;
  return p.param_dtype == p.dtype ? launch_fold<A, T>(args, stream) : launch_fold<A, A>(args, stream);
}

}  // namespace lnc::cuda
