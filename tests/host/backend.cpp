// The CUDA launchers behind the CPU kernels' interface: the glue calls them as it calls those, on CPU tensors.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/cpu.h"
#include "cuda_host.h"
#include "kernels/launch.h"

namespace lnc {
namespace {

// LNC_HOST_ARCH=sm_80, LNC_HOST_SMS=4 and LNC_HOST_SEED=1 choose the device where nobody calls lnc_host_device.
[[maybe_unused]] const bool configured = [] {
  host::Device& device = host::device();
  if (const char* arch = std::getenv("LNC_HOST_ARCH"))
    device.arch = std::atoi(arch + (std::strncmp(arch, "sm_", 3) ? 0 : 3));
  if (const char* count = std::getenv("LNC_HOST_SMS")) device.sm_count = std::atoi(count);
  if (const char* seed = std::getenv("LNC_HOST_SEED")) device.seed = std::strtoull(seed, nullptr, 10);
  return true;
}();

const DeviceTraits& traits() { return host::device_traits(); }

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  const std::string message = cudaGetErrorString(status);
  lnc_host_reset();
  throw std::runtime_error("host execution: " + message);
}

template <class Params, class Workspace, class Run>
int run(const Params* params, Workspace workspace_bytes, Run run) {
  Params p = *params;
  std::vector<char> memory(static_cast<size_t>(workspace_bytes(p, traits())) + 16);
  p.workspace = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16;
  lnc_host_array("workspace", p.workspace, workspace_bytes(p, traits()), 'w');
  return run(p, traits(), nullptr);
}

}  // namespace

const DeviceTraits& host::device_traits() {
  static DeviceTraits traits;
  traits = {device().arch, device().sm_count};
  return traits;
}

namespace cpu {

int64_t forward_workspace(const ForwardParams& p) { return cuda::forward_workspace(p, traits()); }
int64_t backward_workspace(const BackwardParams& p) { return cuda::backward_workspace(p, traits()); }
void forward(const ForwardParams& p, ParallelFor) { check(cuda::forward(p, traits(), nullptr)); }
void backward(const BackwardParams& p, ParallelFor) { check(cuda::backward(p, traits(), nullptr)); }
const char* instruction_set() { return "host execution of the CUDA kernels"; }

}  // namespace cpu
}  // namespace lnc

// For ctypes: the caller has registered every array but the workspace.
extern "C" int lnc_host_forward(const lnc::ForwardParams* p) {
  return lnc::run(p, lnc::cuda::forward_workspace, lnc::cuda::forward);
}
extern "C" int lnc_host_backward(const lnc::BackwardParams* p) {
  return lnc::run(p, lnc::cuda::backward_workspace, lnc::cuda::backward);
}
