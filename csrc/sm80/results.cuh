// Sums on their way to memory, rounded once.
#pragma once

#include "../columns.cuh"
#include "params.cuh"
#include "product.cuh"

namespace fused_lora::sm80 {

// Some of a warp's rows of sums, rounded, in shared memory: a lane takes 8 columns of a row from there, and lanes side by side whole
// lines. Rows are apart by an odd multiple of 16 bytes, so that eight of them lie in different banks.
template <typename T, typename P>
class Slab {
 public:
  static constexpr int kCols = 16 * P::kCols, kRows = kCols > 64 ? 8 : 16, kChunks = kCols / 8, kPitch = kCols * 2 + 16;
  static_assert(kRows * kPitch <= kSlabBytes);

  __device__ __forceinline__ explicit Slab(uint32_t slab) : slab_(slab) {}

  // Those from `first` on of the product's, where the warp reads them.
  __device__ __forceinline__ void put(const Sums& of, int first) const {
    __syncwarp();
    const uint32_t own = slab_ + threadIdx.x % 32 / 4 * kPitch + threadIdx.x % 4 * 4;
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * P::kCols; ++j) {
        const float(&sums)[4] = P::of(of, first / 16, j);
        const int k = (first / 8 + i) % 2 * 2;
        ptx::store_shared(own + i * 8 * kPitch + j * 16, pack<T>(sums[k], sums[k + 1]));
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ uint32_t at(int row, int chunk) const { return slab_ + row * kPitch + chunk * 16; }
  __device__ __forceinline__ uint4 chunk(int row, int chunk) const { return ptx::load_shared(at(row, chunk)); }

 private:
  uint32_t slab_;
};

// A product's rows and columns from (row, col) on, into a matrix of `rows` x `cols`.
template <typename T, typename P>
__device__ __forceinline__ void store_rows(const Sums& of, uint32_t memory, const Matrix& to, int row, int col, int rows, int cols) {
  using Own = Slab<T, P>;
  constexpr int kAtOnce = 32 / Own::kChunks;  // rows that the warp stores
  const Own slab(memory);
  const int lane = threadIdx.x % 32, own_row = lane / Own::kChunks, chunk = lane % Own::kChunks, own_col = col + chunk * 8;
  const bool whole = to.stride % 16 == 0 && own_col + 8 <= cols;
  const int left = rows - row - own_row;
  char* at = const_cast<char*>(to.data) + int64_t{row + own_row} * to.stride + own_col * 2;
#pragma unroll
  for (int first = 0; first < 16 * P::kRows; first += Own::kRows) {
    slab.put(of, first);
    if (whole) {
      uint4 v[Own::kRows / kAtOnce];
#pragma unroll
      for (int i = 0; i < Own::kRows; i += kAtOnce) v[i / kAtOnce] = slab.chunk(i + own_row, chunk);
#pragma unroll
      for (int i = 0; i < Own::kRows; i += kAtOnce, at += kAtOnce * to.stride) {
        if (first + i < left) *reinterpret_cast<uint4*>(at) = v[i / kAtOnce];
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < Own::kRows; i += kAtOnce, at += kAtOnce * to.stride) {
#pragma unroll 1
        for (int c = 0; c < min(8, cols - own_col) && first + i < left; ++c) {
          reinterpret_cast<uint16_t*>(at)[c] = ptx::load_shared_16(slab.at(i + own_row, chunk) + c * 2);
        }
      }
    }
  }
}

// The first kCount of a thread's sums, which another block kept and this one's thread of the same number adds.
template <int kCount>
__device__ __forceinline__ void keep_sums(const Sums& sums, float* target) {
  float4* own = reinterpret_cast<float4*>(target) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float(&four)[4] = sums.of[i];
    __stcg(own + i * kThreads, make_float4(four[0], four[1], four[2], four[3]));
  }
}
template <int kCount>
__device__ __forceinline__ void add_sums(Sums& sums, const float* kept) {
  const float4* own = reinterpret_cast<const float4*>(kept) + threadIdx.x;
  constexpr int kAtOnce = kCount < 16 ? kCount : 16;  // under way: the compiler would wait for five at a time
#pragma unroll
  for (int first = 0; first < kCount; first += kAtOnce) {
    float4 read[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) read[i] = ptx::load_l2(own + (first + i) * kThreads);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float(&four)[4] = sums.of[first + i];
      four[0] += read[i].x;
      four[1] += read[i].y;
      four[2] += read[i].z;
      four[3] += read[i].w;
    }
  }
}

template <typename P>
__device__ __forceinline__ void scale_by(Sums& of, float scale) {
#pragma unroll
  for (int i = 0; i < P::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < 2 * P::kCols; ++j) {
#pragma unroll
      for (float& sum : P::of(of, i, j)) sum *= scale;
    }
  }
}

// A product's columns from `col` on. Each lane fetches some for the whole warp, by way of its slab: a lane has sums in a quarter of
// them, and would wait for memory at each.
template <typename P>
__device__ __forceinline__ void finish_columns(Sums& of, uint32_t slab, const Part& part, int col) {
  if (part.gain == nullptr && part.bias == nullptr) return;
  constexpr int kCols = 16 * P::kCols;
  static_assert(kCols * Column::kBytes <= kSlabBytes);
  const int lane = threadIdx.x % 32;
  __syncwarp();  // all have read what was there
#pragma unroll
  for (int first = 0; first < kCols; first += 32) {
    const int c = first + lane;
    if (c < kCols) Column::of(part, min(col + c, part.cols - 1)).keep(slab + c * Column::kBytes);
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 2 * P::kCols; ++j) {
    const auto pair = ColumnPair::kept(slab + (j * 8 + lane % 4 * 2) * Column::kBytes);
#pragma unroll
    for (int i = 0; i < P::kRows; ++i) pair.finish(P::of(of, i, j));
  }
}

}  // namespace fused_lora::sm80
