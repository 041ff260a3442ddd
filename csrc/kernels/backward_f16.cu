#include "launch.cuh"

namespace lnc::cuda {
template cudaError_t launch_backward<__half, __half>(const BackwardParams&, const Plan&, cudaStream_t);
template cudaError_t launch_backward<__half, float>(const BackwardParams&, const Plan&, cudaStream_t);
}  // namespace lnc::cuda
