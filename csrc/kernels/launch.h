// The CUDA kernels as the glue and the standalone program see them. Errors come back as values; nothing synchronises.
#pragma once
#include "params.h"
#include "plan.h"
#include "platform.cuh"

namespace lnc::cuda {

const DeviceTraits& current_device_traits();

int64_t forward_workspace(const ForwardParams&, const DeviceTraits&);    // bytes
int64_t backward_workspace(const BackwardParams&, const DeviceTraits&);  // bytes
cudaError_t forward(const ForwardParams&, const DeviceTraits&, cudaStream_t);
cudaError_t backward(const BackwardParams&, const DeviceTraits&, cudaStream_t);

// One of these a data type: each in a translation unit of its own, so that they compile side by side.
template <class T>
cudaError_t launch_forward(const ForwardParams&, const Plan&, cudaStream_t);
template <class T, class D>  // D: the type of grad_output
cudaError_t launch_backward(const BackwardParams&, const Plan&, cudaStream_t);

}  // namespace lnc::cuda
