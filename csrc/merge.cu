// weight += scale * B A in place: fp32 product and sum, one rounding. Entries to which nothing is added keep their bits.
//
// A block owns 64 x 128 of the weight and walks over r in steps of 16 staged in shared memory; a thread owns
// 4 rows x 8 columns, so that 16-bit weights move 16 bytes at a time. Bound by memory up to r of about 32.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "merge.h"

namespace fused_lora {
// Not without a name, which would be another one in each build.
namespace merging {

constexpr int BLOCK_N = 64;
constexpr int BLOCK_K = 128;
constexpr int BLOCK_R = 16;
constexpr int THREADS = 256;
constexpr int ROWS = 4;  // of a thread
constexpr int COLS = 8;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ float from_float<float>(float x) { return x; }
template <>
__device__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// COLS consecutive entries of one row, moved whole where the row allows it.
template <typename T>
struct alignas(sizeof(T) * COLS > 16 ? 16 : sizeof(T) * COLS) Run {
  T values[COLS];
};

template <typename Factor>
__device__ void stage(const MergeParams& p, int64_t row, int64_t col, int step, float (*smem_B)[BLOCK_R + 1],
                      float (*smem_A)[BLOCK_K]) {
  const Factor* A = static_cast<const Factor*>(p.A);
  const Factor* B = static_cast<const Factor*>(p.B);
  for (int i = threadIdx.x; i < BLOCK_N * BLOCK_R; i += THREADS) {
    const int n = i / BLOCK_R, k = i % BLOCK_R;
    const bool inside = row + n < p.N && step + k < p.r;
    smem_B[n][k] = inside ? to_float(B[(row + n) * p.stride_B + step + k]) : 0.0f;
  }
  for (int i = threadIdx.x; i < BLOCK_R * BLOCK_K; i += THREADS) {
    const int k = i / BLOCK_K, c = i % BLOCK_K;
    const bool inside = col + c < p.K && step + k < p.r;
    smem_A[k][c] = inside ? to_float(A[(step + k) * p.stride_A + col + c]) : 0.0f;
  }
}

template <typename Weight>
__device__ void add_row(const MergeParams& p, int64_t row, int64_t col, const float* delta) {
  Weight* target = static_cast<Weight*>(p.weight) + row * p.stride_weight + col;
  const bool whole = col + COLS <= p.K && reinterpret_cast<uintptr_t>(target) % alignof(Run<Weight>) == 0;
  const int count = whole ? COLS : static_cast<int>(min(int64_t{COLS}, p.K - col));
  Run<Weight> run;
  if (whole) run = *reinterpret_cast<const Run<Weight>*>(target);
#pragma unroll
  for (int c = 0; c < COLS; ++c) {
    if (c >= count) break;
    const Weight old = whole ? run.values[c] : target[c];
    run.values[c] = delta[c] == 0.0f ? old : from_float<Weight>(to_float(old) + delta[c]);
    if (!whole) target[c] = run.values[c];
  }
  if (whole) *reinterpret_cast<Run<Weight>*>(target) = run;
}

template <typename Weight, typename Factor>
__global__ void __launch_bounds__(THREADS) merge_kernel(const MergeParams p) {
  __shared__ float smem_B[BLOCK_N][BLOCK_R + 1];
  __shared__ alignas(16) float smem_A[BLOCK_R][BLOCK_K];
  const int64_t row = int64_t{blockIdx.y} * BLOCK_N, col = int64_t{blockIdx.x} * BLOCK_K;
  const int thread_row = threadIdx.x / (BLOCK_K / COLS) * ROWS, thread_col = threadIdx.x % (BLOCK_K / COLS) * COLS;

  float delta[ROWS][COLS] = {};
  for (int step = 0; step < p.r; step += BLOCK_R) {
    stage<Factor>(p, row, col, step, smem_B, smem_A);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < BLOCK_R; ++k) {
      alignas(16) float a[COLS];  // 16 bytes at a time: word by word, eight threads would meet in each bank
      *reinterpret_cast<float4*>(a) = *reinterpret_cast<const float4*>(&smem_A[k][thread_col]);
      *reinterpret_cast<float4*>(a + 4) = *reinterpret_cast<const float4*>(&smem_A[k][thread_col + 4]);
#pragma unroll
      for (int n = 0; n < ROWS; ++n) {
#pragma unroll
        for (int c = 0; c < COLS; ++c) delta[n][c] += smem_B[thread_row + n][k] * a[c];
      }
    }
    __syncthreads();
  }

  const float scale = *p.scale;
#pragma unroll
  for (int n = 0; n < ROWS; ++n) {
#pragma unroll
    for (int c = 0; c < COLS; ++c) delta[n][c] *= scale;
    if (row + thread_row + n < p.N && col + thread_col < p.K) {
      add_row<Weight>(p, row + thread_row + n, col + thread_col, delta[n]);
    }
  }
}

template <typename Weight, typename Factor>
cudaError_t launch(const MergeParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((p.K + BLOCK_K - 1) / BLOCK_K), static_cast<unsigned>((p.N + BLOCK_N - 1) / BLOCK_N));
  merge_kernel<Weight, Factor><<<grid, THREADS, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace merging

using namespace merging;

cudaError_t launch_merge(const MergeParams& p, DType weight_dtype, DType factor_dtype, cudaStream_t stream) {
  const bool same = weight_dtype == factor_dtype;
  switch (weight_dtype) {
    case DType::kFloat32: return launch<float, float>(p, stream);
    case DType::kFloat16: return same ? launch<__half, __half>(p, stream) : launch<__half, float>(p, stream);
    case DType::kBFloat16:
      return same ? launch<__nv_bfloat16, __nv_bfloat16>(p, stream) : launch<__nv_bfloat16, float>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fused_lora
