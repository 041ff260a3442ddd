#include "launch.cuh"

namespace lnc::cuda {
template cudaError_t launch_backward<float, float>(const BackwardParams&, const Plan&, cudaStream_t);
}  // namespace lnc::cuda
