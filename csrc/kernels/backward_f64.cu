#include "launch.cuh"

namespace lnc::cuda {
template cudaError_t launch_backward<double, double>(const BackwardParams&, const Plan&, cudaStream_t);
}  // namespace lnc::cuda
