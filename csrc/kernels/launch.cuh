// From a plan to a launch. Included by the translation units that instantiate kernels.
#pragma once
#include "backward.cuh"
#include "forward.cuh"
#include "launch.h"

namespace lnc::cuda {

// Blocks have 48 KiB without asking; this and what a kernel declares itself are less.
constexpr int64_t kUnaskedShared = 40 << 10;

// Leaves no error behind that a later call would find.
template <class Args>
cudaError_t ask_shared(void (*kernel)(Args), int64_t bytes) {
  cudaError_t status = cudaSuccess;
#ifndef LNC_HOST_EXECUTION
  if (bytes > kUnaskedShared)
    status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes));
  if (status != cudaSuccess) cudaGetLastError();
#endif
  return status;
}

// What all blocks of a grid find zero when they begin.
inline cudaError_t clear(void* memory, int64_t bytes, cudaStream_t stream) {
#ifdef LNC_HOST_EXECUTION
  std::memset(memory, 0, bytes);
  return cudaSuccess;
#else
  return cudaMemsetAsync(memory, 0, bytes, stream);
#endif
}

inline dim3 grid_of(const Plan& plan) {
  return dim3(static_cast<unsigned>(plan.blocks_x), static_cast<unsigned>(plan.blocks_y));
}

// x counts the threads of a row, y the rows.
inline dim3 block_of(const Plan& plan) { return dim3(plan.threads_per_row, plan.rows_per_block); }

// The one place where kernels start: in tests/host it runs them on the CPU.
template <class Args>
cudaError_t launch_kernel(void (*kernel)(Args), dim3 grid, dim3 block, cudaStream_t stream, const Args& args,
                          int64_t shared = 0, int cluster = 1, bool team = false, bool cooperative = false) {
#ifdef LNC_HOST_EXECUTION
  return lnc::host::launch(kernel, grid, block, shared, cluster, team, stream, args);
#else
  const void* function = reinterpret_cast<const void*>(kernel);
  void* list[] = {const_cast<Args*>(&args)};
  if (!cooperative && (cluster == 1 || team)) return cudaLaunchKernel(function, grid, block, list, shared, stream);
  cudaLaunchAttribute attribute{};
  if (cooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block;
  config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelExC(&config, function, list);
#endif
}

template <class Args>
cudaError_t launch_planned(void (*kernel)(Args), const Plan& plan, cudaStream_t stream, const Args& args,
                           int64_t shared = 0) {
  return launch_kernel(kernel, grid_of(plan), block_of(plan), stream, args, shared, plan.cluster, plan.is("team"),
                       plan.cooperative);
}

// Of kernels for whole rows. float64 is for checks: one kernel serves both norms, for they would take as long to
// compile as each other type's.
template <class T>
constexpr Norm whole_norm(Norm norm) {
  return sizeof(T) == 8 ? Norm::any : norm;
}

template <class T>
ForwardArgs forward_args(const ForwardParams& p, const Plan& plan) {
  ForwardArgs a{};
  a.p = p;
  const int blocks = plan.is("team") ? plan.cluster : 1;
  a.even = int64_t(blocks) * plan.threads_per_row * plan.tier->vecs * kPack<T> == p.cols;
  a.wide_params = kNarrow<T> && p.param_dtype == accumulate_type(p.dtype);
  a.wide_output = kNarrow<T> && p.output_dtype == accumulate_type(p.dtype);
  const bool narrow = p.weight && !a.wide_params && !a.wide_output;
  a.plain = narrow && !p.bias == (whole_norm<T>(p.norm) == Norm::rms);
  a.plain_weight = narrow && !p.bias;
  a.output_aligned = is_aligned(p.output, RowMap::contiguous(p.rows, p.cols), p.rows, size_of(p.output_dtype));
  a.inverse_cols = 1.0 / double(p.cols);
  a.slice_cols = plan.slice_cols;
  a.slices = plan.slices;
  a.cluster = plan.cluster;
  a.board = static_cast<uint64_t*>(p.workspace);
  return a;
}

template <class T, Norm norm, bool WHOLE>
cudaError_t launch_forward_rows(const ForwardArgs& args, const Plan& plan, cudaStream_t stream) {
  constexpr bool wide = sizeof(T) >= 4;
  const int vecs = plan.tier->vecs;
  auto launch = [&](void (*kernel)(ForwardArgs), int64_t shared = 0) {
    return launch_planned(kernel, plan, stream, args, shared);
  };
  if constexpr (sizeof(T) < 8)
    if (plan.is("team")) {
      const cudaError_t status = clear(args.board, plan.board, stream);
      return status != cudaSuccess ? status : launch(forward_rows < T, norm, kTeam, wide ? 8 : 4, WHOLE >);
    }
  if (plan.is("staged") || plan.is("cluster")) {
    const int64_t shared = sizeof(ForwardShared<Accumulate<T>>) + plan.shared;
    const cudaError_t status = ask_shared(forward_staged<T, norm, 4, WHOLE>, shared);
    return status != cudaSuccess ? status : launch(forward_staged<T, norm, 4, WHOLE>, shared);
  }
  if (plan.is("slices")) {
    const cudaError_t status = launch(forward_slice_moments<T, norm, 4, WHOLE>);
    return status != cudaSuccess ? status : launch(forward_slices<T, norm, 4, WHOLE>);
  }
  switch (plan.tier->group) {
    case 1:
      return launch(forward_rows<T, norm, 1, 1, WHOLE>);
    case 4:
      return launch(forward_rows<T, norm, 4, 1, WHOLE>);
    case 8:
      return launch(vecs == 1 ? forward_rows<T, norm, 8, 1, WHOLE> : forward_rows<T, norm, 8, 2, WHOLE>);
    case 16:
      return launch(vecs == 2 ? forward_rows<T, norm, 16, 2, WHOLE> : forward_rows<T, norm, 16, 4, WHOLE>);
    case 32:
      if constexpr (wide)
        if (vecs == 4) return launch(forward_rows<T, norm, 32, 4, WHOLE>);
      break;
    case 64:
      if constexpr (sizeof(T) == 4)
        if (vecs == 3) return launch(forward_rows<T, norm, 64, 3, WHOLE>);
      if constexpr (sizeof(T) < 8) return launch(forward_rows < T, norm, 64, wide ? 4 : 2, WHOLE >);
      break;
    case kWholeWarps:
      if constexpr (wide)
        if (vecs == 8) return launch(forward_rows<T, norm, kWarps, 8, WHOLE>);
      if constexpr (!wide)
        if (vecs == 2) return launch(forward_rows<T, norm, kWarps, 2, WHOLE>);
      return launch(forward_rows<T, norm, kWarps, 4, WHOLE>);
  }
  return cudaErrorInvalidConfiguration;
}

template <class T>
cudaError_t launch_forward(const ForwardParams& p, const Plan& plan, cudaStream_t stream) {
  const ForwardArgs args = forward_args<T>(p, plan);
  if (!plan.whole) return launch_forward_rows<T, Norm::any, false>(args, plan, stream);
  return p.norm == Norm::layer ? launch_forward_rows<T, whole_norm<T>(Norm::layer), true>(args, plan, stream)
                               : launch_forward_rows<T, whole_norm<T>(Norm::rms), true>(args, plan, stream);
}

template <class T, class D>
BackwardArgs backward_args(const BackwardParams& p, const Plan& plan) {
  BackwardArgs a{};
  a.p = p;
  a.wide_params = kNarrow<T> && p.param_dtype == accumulate_type(p.dtype);
  a.param_grads = p.grad_weight || p.grad_bias;
  a.grad_output_aligned = is_aligned(p.grad_output, p.grad_output_rows, p.rows, sizeof(D));
  a.inverse_cols = 1.0 / double(p.cols);
  a.rstd = static_cast<const Accumulate<T>*>(p.stats) + (p.norm == Norm::layer ? p.rows : 0);
  a.slice_cols = plan.slice_cols;
  a.slices = plan.slices;
  a.row_blocks = plan.partials;
  a.cluster = plan.cluster;
  a.partials = p.workspace;
  a.sums = static_cast<char*>(p.workspace) + partials_bytes(p, plan);
  a.board = plan.is("team") ? static_cast<uint64_t*>(a.sums) : nullptr;
  return a;
}

template <class T, class D, Norm norm, bool WHOLE>
cudaError_t launch_backward_rows(const BackwardArgs& args, const Plan& plan, cudaStream_t stream) {
  auto launch = [&](void (*kernel)(BackwardArgs)) { return launch_planned(kernel, plan, stream, args); };
  if (plan.is("slices")) {
    if (args.p.grad_input) {
      const dim3 every_row(plan.slices, at_most(args.p.rows, kMaxGridY));
      const cudaError_t status =
          launch_kernel(backward_slice_sums<T, D, norm, 2, WHOLE>, every_row, block_of(plan), stream, args);
      if (status != cudaSuccess) return status;
    }
    return launch(backward_slices<T, D, norm, 2, WHOLE>);
  }
  if (plan.cluster > 1) {
    const bool exchange = args.board && args.p.grad_input;
    const cudaError_t status = exchange ? clear(args.board, plan.board, stream) : cudaSuccess;
    return status != cudaSuccess ? status : launch(backward_rows<T, D, norm, kWarps, 2, WHOLE, true>);
  }
  switch (plan.tier->group) {
    case 1:
      return launch(backward_rows<T, D, norm, 1, 1, WHOLE>);
    case 4:
      return launch(backward_rows<T, D, norm, 4, 1, WHOLE>);
    case 8:
      return launch(plan.tier->vecs == 1 ? backward_rows<T, D, norm, 8, 1, WHOLE>
                                         : backward_rows<T, D, norm, 8, 2, WHOLE>);
    case 16:
      return launch(backward_rows<T, D, norm, 16, 2, WHOLE>);
    case 32:
      return launch(backward_rows<T, D, norm, 32, 2, WHOLE>);
    case 64:
      if constexpr (sizeof(T) == 2) return launch(backward_rows<T, D, norm, 64, 2, WHOLE>);
      break;
    case kWholeWarps:
      return launch(backward_rows<T, D, norm, kWarps, 2, WHOLE>);
  }
  return cudaErrorInvalidConfiguration;
}

template <class A, class P>
cudaError_t launch_fold(const BackwardArgs& args, cudaStream_t stream) {
  auto launch = [&](void (*kernel)(BackwardArgs), int columns, int warps) {
    return launch_kernel(kernel, dim3(ceil_div(args.p.cols, 32 * columns), 2), dim3(32 * warps), stream, args);
  };
  constexpr int M = kPack<A>;
  // Of few columns one a thread makes more blocks.
  if (args.p.cols % M || args.p.cols < 2048) return launch(fold_partials<A, P, 1, kFoldWarps>, 1, kFoldWarps);
  if (args.row_blocks > kFoldAhead) return launch(fold_partials<A, P, M, kFoldWarps>, M, kFoldWarps);
  return launch(fold_partials<A, P, M, 1>, M, 1);
}

// Whole rows with a weight of their own type are the usual case; the others share kernels that take anything.
template <class T, class D>
cudaError_t launch_backward(const BackwardParams& p, const Plan& plan, cudaStream_t stream) {
  using A = Accumulate<T>;
  const BackwardArgs args = backward_args<T, D>(p, plan);
  auto launch_rows = [&] {
    if constexpr (std::is_same<T, D>::value)
      if (plan.whole && p.weight && !args.wide_params)
        return p.norm == Norm::layer ? launch_backward_rows<T, D, whole_norm<T>(Norm::layer), true>(args, plan, stream)
                                     : launch_backward_rows<T, D, whole_norm<T>(Norm::rms), true>(args, plan, stream);
    return launch_backward_rows<T, D, Norm::any, false>(args, plan, stream);
  };
  const cudaError_t status = launch_rows();
  if (status != cudaSuccess || !args.param_grads) return status;
  return p.param_dtype == p.dtype ? launch_fold<A, T>(args, stream) : launch_fold<A, A>(args, stream);
}

}  // namespace lnc::cuda
