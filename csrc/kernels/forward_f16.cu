#include "launch.cuh"

namespace lnc::cuda {
template cudaError_t launch_forward<__half>(const ForwardParams&, const Plan&, cudaStream_t);
}  // namespace lnc::cuda
