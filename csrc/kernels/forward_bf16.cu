#include "launch.cuh"

namespace lnc::cuda {
template cudaError_t launch_forward<__nv_bfloat16>(const ForwardParams&, const Plan&, cudaStream_t);
}  // namespace lnc::cuda
