#include "scaled_rows.h"

#include "elements.cuh"

namespace fused_lora {
// Not without a name, which would be another one in each build.
namespace scaling_rows {

constexpr int kThreads = 256, kRows = 4;  // of a block
constexpr int kChunk = 8;                 // columns in 16 bytes

template <typename T>
__device__ __forceinline__ uint4 times(uint4 chunk, float gain) {
  uint32_t* pairs = &chunk.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(pairs[i]);
    pairs[i] = pack<T>(gain * pair.x, gain * pair.y);
  }
  return chunk;
}

// A chunk of each row a thread, all of them read before one is written, so that enough of them are under way.
template <typename T>
__device__ void scale_weight(const float* gain, const Operand& from, const Operand& to, int64_t first_row, int chunk) {
  if (chunk * kChunk >= from.cols) return;
  uint4 chunks[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t row = first_row + i;
    if (row < from.rows) chunks[i] = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(from.data) + row * from.stride) + chunk);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t row = first_row + i;
    if (row < from.rows) reinterpret_cast<uint4*>(static_cast<T*>(to.data) + row * to.stride)[chunk] = times<T>(chunks[i], gain[row]);
  }
}

template <typename T>
__device__ void scale_B(const float* gain, const Operand& from, const Operand& to, int64_t first_row) {
  const int64_t last_row = min(first_row + kRows, from.rows);
  for (int64_t row = first_row; row < last_row; ++row) {
    for (int64_t col = threadIdx.x; col < from.cols; col += kThreads) {
      const float value = load_as_float(from.data, from.format, row * from.stride + col);
      store_as(to.data, to.format, row * to.stride + col, gain[row] * value);
    }
  }
}

// Blocks of some rows: B, and W's columns in chunks.
template <typename T>
__global__ void __launch_bounds__(kThreads) scaled_rows_kernel(const float* gain, Operand weight, Operand B, Operand to_weight, Operand to_B) {
  const int64_t first_row = int64_t{blockIdx.x} * kRows;
  if (blockIdx.y == 0) return scale_B<T>(gain, B, to_B, first_row);
  scale_weight<T>(gain, weight, to_weight, first_row, (blockIdx.y - 1) * kThreads + threadIdx.x);
}

}  // namespace scaling_rows

using namespace scaling_rows;

cudaError_t launch_scaled_rows(const float* gain, const Operand& weight, const Operand& B, const Operand& to_weight, const Operand& to_B,
                               cudaStream_t stream) {
  constexpr int64_t kCols = kThreads * kChunk;
  const int64_t of_weight = to_weight.data == nullptr ? 0 : (weight.cols + kCols - 1) / kCols;
  const dim3 blocks(static_cast<unsigned>((B.rows + kRows - 1) / kRows), static_cast<unsigned>(1 + of_weight));
  const auto kernel = to_B.format == DType::kFloat16 ? scaled_rows_kernel<__half> : scaled_rows_kernel<__nv_bfloat16>;
  kernel<<<blocks, kThreads, 0, stream>>>(gain, weight, B, to_weight, to_B);
  return cudaGetLastError();
}

}  // namespace fused_lora
