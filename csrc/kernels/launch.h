// The CUDA kernels as the glue and the standalone program see them. Errors come back as values; nothing synchronises.
#pragma once
#include "params.h"
#include "plan.h"
#include "platform.cuh"

namespace lnc::cuda {

const DeviceTraits& current_device_traits();

int64_t forward_workspace(const ForwardParams&, const DeviceTraits&);  // bytes
int64_t backward_workspace(const BackwardParams&, DeviceTraits);       // bytes
cudaError_t forward(const ForwardParams&, const DeviceTraits&, cudaStream_t);
cudaError_t backward(const BackwardParams&, const DeviceTraits&, cudaStream_t);

// Of backward's workspace the partials come first: they are read by whole warps and begin aligned. Then the sums of
// sliced rows, or the teams' boards.
inline int64_t partials_bytes(const BackwardParams& p, const Plan& plan) {
  if (!p.grad_weight && !p.grad_bias) return 0;
  return ceil_div(2 * plan.partials * p.cols * size_of(accumulate_type(p.dtype)), 16) * 16;
}

// Whether every row of an array begins at a multiple of 16 bytes; yes where there is no array.
inline bool is_aligned(const void* p, const RowMap& map, int64_t rows, int64_t size) {
  auto multiple = [](int64_t bytes) { return bytes % 16 == 0; };
  return !p || (multiple(reinterpret_cast<intptr_t>(p)) &&
                (rows == 1 || map.inner == 1 || multiple(map.inner_stride * size)) &&
                (rows <= map.inner || multiple(map.outer_stride * size)));
}

// One of these a data type: each in a translation unit of its own, so that they compile side by side.
template <class T>
cudaError_t launch_forward(const ForwardParams&, const Plan&, cudaStream_t);
template <class T, class D>  // D: the type of grad_output
cudaError_t launch_backward(const BackwardParams&, const Plan&, cudaStream_t);

}  // namespace lnc::cuda
