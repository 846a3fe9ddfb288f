#include "check.h"

namespace fused_lora {

void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  fail("CUDA error: ", cudaGetErrorString(error));
}

}  // namespace fused_lora
