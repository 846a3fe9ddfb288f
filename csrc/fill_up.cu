#include "fill_up.h"

namespace fused_lora {
// Not without a name, which would be another one in each build.
namespace filling_up {

constexpr int kThreads = 256, kAtOnce = 8, kChunk = kThreads * kAtOnce;  // columns of a row

// An element a thread: neighbours' accesses share their sectors wherever a row starts. All of a chunk's are read before one is
// written, so that enough of them are under way.
__global__ void __launch_bounds__(kThreads) fill_up_kernel(const uint16_t* __restrict__ from, int64_t from_stride,
                                                           uint16_t* __restrict__ to, int64_t to_stride, int cols) {
  const int64_t row = blockIdx.x;
  const int first = blockIdx.y * kChunk + threadIdx.x;
  from += row * from_stride;
  to += row * to_stride;
  uint16_t values[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const int col = first + i * kThreads;
    if (col < cols) values[i] = from[col];
  }
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const int col = first + i * kThreads;
    if (col < cols) to[col] = values[i];
  }
}

}  // namespace filling_up

using namespace filling_up;

cudaError_t launch_fill_up(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows, int64_t cols,
                           cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(rows), static_cast<unsigned>((cols + kChunk - 1) / kChunk));
  fill_up_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<const uint16_t*>(from), from_stride, static_cast<uint16_t*>(to),
                                                  to_stride, static_cast<int>(cols));
  return cudaGetLastError();
}

}  // namespace fused_lora
