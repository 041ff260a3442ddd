#include "launch.cuh"

namespace lnc::cuda {
template cudaError_t launch_forward<double>(const ForwardParams&, const Plan&, cudaStream_t);
}  // namespace lnc::cuda
