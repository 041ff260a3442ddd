// By data type; plans and their workspace. The kernels are instantiated elsewhere.
#include "launch.h"

namespace lnc::cuda {

#ifndef LNC_HOST_EXECUTION
__global__ void any_kernel() {}
#endif

const DeviceTraits& current_device_traits() {
#ifdef LNC_HOST_EXECUTION
  return lnc::host::device_traits();
#else
  constexpr int kMaxDevices = 64;
  static thread_local DeviceTraits known[kMaxDevices];
  int device = 0;
  cudaGetDevice(&device);
  DeviceTraits& traits = known[device % kMaxDevices];
  if (traits.sm_count == 0) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&traits.sm_count, cudaDevAttrMultiProcessorCount, device);
    traits.arch = 10 * major + minor;
    cudaFuncAttributes code{};
    cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(any_kernel));
    traits.code_arch = code.ptxVersion;
  }
  return traits;
#endif
}

namespace {

bool all_aligned(const ForwardParams& p) {
  const RowMap dense = RowMap::contiguous(p.rows, p.cols);
  const int64_t size = size_of(p.dtype);
  return is_aligned(p.input, p.input_rows, p.rows, size) && is_aligned(p.residual, p.residual_rows, p.rows, size) &&
         is_aligned(p.sum, dense, p.rows, size) && is_aligned(p.output, dense, p.rows, size_of(p.output_dtype));
}

bool all_aligned(const BackwardParams& p) {
  const int64_t size = size_of(p.dtype);
  return is_aligned(p.grad_output, p.grad_output_rows, p.rows, size_of(p.output_dtype)) &&
         is_aligned(p.grad_sum, p.grad_sum_rows, p.rows, size) && is_aligned(p.input, p.input_rows, p.rows, size) &&
         is_aligned(p.grad_input, RowMap::contiguous(p.rows, p.cols), p.rows, size);
}

// A grid of teams runs as a whole or not at all: where not all of the device is ours it may find no room.
template <class F>
cudaError_t with_teams_or_without(DeviceTraits device, F launch) {
  const cudaError_t status = launch(device);
  if (status != cudaErrorCooperativeLaunchTooLarge || !device.teams) return status;
  cudaGetLastError();
  device.teams = false;
  return launch(device);
}

int64_t workspace(const ForwardParams& p, const Plan& plan) {
  return plan.is("slices") ? 2 * p.rows * plan.slices * size_of(accumulate_type(p.dtype)) : plan.board;
}

int64_t workspace(const BackwardParams& p, const Plan& plan) {
  const int64_t sums = plan.is("slices") ? 2 * p.rows * plan.slices * size_of(accumulate_type(p.dtype)) : plan.board;
  return partials_bytes(p, plan) + sums;
}

}  // namespace

int64_t forward_workspace(const ForwardParams& p, const DeviceTraits& device) {
  return workspace(p, plan_forward(p.rows, p.cols, p.dtype, device));
}

int64_t backward_workspace(const BackwardParams& p, DeviceTraits device) {
  const Plan plan = plan_backward(p.rows, p.cols, p.dtype, device);
  device.teams = false;
  return at_least(workspace(p, plan), workspace(p, plan_backward(p.rows, p.cols, p.dtype, device)));
}

cudaError_t forward(const ForwardParams& p, const DeviceTraits& device, cudaStream_t stream) {
  const bool aligned = all_aligned(p);
  return with_teams_or_without(device, [&](const DeviceTraits& traits) {
    const Plan plan = plan_forward(p.rows, p.cols, p.dtype, traits, aligned);
    switch (p.dtype) {
      case DType::f32:
        return launch_forward<float>(p, plan, stream);
      case DType::f16:
        return launch_forward<__half>(p, plan, stream);
      case DType::bf16:
        return launch_forward<__nv_bfloat16>(p, plan, stream);
      case DType::f64:
        return launch_forward<double>(p, plan, stream);
    }
    return cudaErrorInvalidValue;
  });
}

cudaError_t backward(const BackwardParams& p, const DeviceTraits& device, cudaStream_t stream) {
  const bool aligned = all_aligned(p), wide = p.output_dtype != p.dtype;
  return with_teams_or_without(device, [&](const DeviceTraits& traits) {
    const Plan plan = plan_backward(p.rows, p.cols, p.dtype, traits, aligned);
    switch (p.dtype) {
      case DType::f32:
        return launch_backward<float, float>(p, plan, stream);
      case DType::f16:
        return wide ? launch_backward<__half, float>(p, plan, stream)
                    : launch_backward<__half, __half>(p, plan, stream);
      case DType::bf16:
        return wide ? launch_backward<__nv_bfloat16, float>(p, plan, stream)
                    : launch_backward<__nv_bfloat16, __nv_bfloat16>(p, plan, stream);
      case DType::f64:
        return launch_backward<double, double>(p, plan, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace lnc::cuda
