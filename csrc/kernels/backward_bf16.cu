#include "launch.cuh"

namespace lnc::cuda {
template cudaError_t launch_backward<__nv_bfloat16, __nv_bfloat16>(const BackwardParams&, const Plan&, cudaStream_t);
template cudaError_t launch_backward<__nv_bfloat16, float>(const BackwardParams&, const Plan&, cudaStream_t);
}  // namespace lnc::cuda
