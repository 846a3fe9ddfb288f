// The tensor cores of Hopper: 64 x N += 64 x 16 times 16 x N by one warpgroup, both operands in shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fused_lora::ptx {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `kGroups` committed groups are unfinished.
template <int kGroups>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// Accumulators as operands of the assembly: d[i], ..., and their names %0, ... in its text.
#define FUSED_LORA_D8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FUSED_LORA_D16(i) FUSED_LORA_D8(i), FUSED_LORA_D8(i + 8)
#define FUSED_LORA_D32(i) FUSED_LORA_D16(i), FUSED_LORA_D16(i + 16)
#define FUSED_LORA_D64(i) FUSED_LORA_D32(i), FUSED_LORA_D32(i + 32)
#define FUSED_LORA_D128(i) FUSED_LORA_D64(i), FUSED_LORA_D64(i + 64)
#define FUSED_LORA_NAMES8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FUSED_LORA_NAMES16 FUSED_LORA_NAMES8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FUSED_LORA_NAMES32 \
  FUSED_LORA_NAMES16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FUSED_LORA_NAMES64                                                                        \
  FUSED_LORA_NAMES32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
                     ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FUSED_LORA_NAMES128                                                                               \
  FUSED_LORA_NAMES64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"   \
                     ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"   \
                     ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
                     ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// A, B, TA, TB: the numbers of the operands that follow the accumulators.
#define FUSED_LORA_WGMMA(N, TYPE, COUNT, A, B, TA, TB)                                                                \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FUSED_LORA_NAMES##COUNT "}, %" #A \
               ", %" #B ", 1, 1, 1, %" #TA ", %" #TB ";"                                                              \
               : FUSED_LORA_D##COUNT(0)                                                                               \
               : "l"(lhs), "l"(rhs), "n"(kLhsMN), "n"(kRhsMN))

#define FUSED_LORA_WGMMA_REGISTERS(N, TYPE, COUNT, A0, A1, A2, A3, B, TB)                                              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FUSED_LORA_NAMES##COUNT           \
               "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", 1, 1, 1, %" #TB ";"                            \
               : FUSED_LORA_D##COUNT(0)                                                                               \
               : "r"(lhs[0]), "r"(lhs[1]), "r"(lhs[2]), "r"(lhs[3]), "l"(rhs), "n"(kRhsMN))

#define FUSED_LORA_WGMMA_OF(N, COUNT, A, B, TA, TB)                    \
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {                    \
    FUSED_LORA_WGMMA(N, "bf16", COUNT, A, B, TA, TB);                  \
  } else {                                                             \
    static_assert(std::is_same_v<T, __half>, "16-bit operands only");  \
    FUSED_LORA_WGMMA(N, "f16", COUNT, A, B, TA, TB);                   \
  }

// d (64 x N, spread over the warpgroup) += lhs (64 x 16) rhs (16 x N). kLhsMN and kRhsMN: whether that operand lies with its
// M or N index contiguous instead of the summed one. Accumulators start as zeros: a first product that does not read them
// would leave them undefined before it, and then the compiler keeps those of all kinds of work alive at once, and spills.
template <typename T, bool kLhsMN, bool kRhsMN, int kCount>
__device__ __forceinline__ void wgmma(float (&d)[kCount], uint64_t lhs, uint64_t rhs) {
  if constexpr (kCount == 8) {
    FUSED_LORA_WGMMA_OF(16, 8, 8, 9, 10, 11)
  } else if constexpr (kCount == 16) {
    FUSED_LORA_WGMMA_OF(32, 16, 16, 17, 18, 19)
  } else if constexpr (kCount == 32) {
    FUSED_LORA_WGMMA_OF(64, 32, 32, 33, 34, 35)
  } else if constexpr (kCount == 64) {
    FUSED_LORA_WGMMA_OF(128, 64, 64, 65, 66, 67)
  } else {
    static_assert(kCount == 128, "N must be 16, 32, 64, 128 or 256");
    FUSED_LORA_WGMMA_OF(256, 128, 128, 129, 130, 131)
  }
}

// The same with lhs in registers, spread as the first 16 columns of an accumulator are.
template <typename T, bool kRhsMN, int kCount>
__device__ __forceinline__ void wgmma(float (&d)[kCount], const uint32_t (&lhs)[4], uint64_t rhs) {
  constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (kCount == 64) {
    if constexpr (kBFloat16) FUSED_LORA_WGMMA_REGISTERS(128, "bf16", 64, 64, 65, 66, 67, 68, 69);
    else FUSED_LORA_WGMMA_REGISTERS(128, "f16", 64, 64, 65, 66, 67, 68, 69);
  } else {
    static_assert(kCount == 128, "N must be 128 or 256");
    if constexpr (kBFloat16) FUSED_LORA_WGMMA_REGISTERS(256, "bf16", 128, 128, 129, 130, 131, 132, 133);
    else FUSED_LORA_WGMMA_REGISTERS(256, "f16", 128, 128, 129, 130, 131, 132, 133);
  }
}

#undef FUSED_LORA_WGMMA_OF
#undef FUSED_LORA_WGMMA_REGISTERS
#undef FUSED_LORA_WGMMA
#undef FUSED_LORA_NAMES128
#undef FUSED_LORA_NAMES64
#undef FUSED_LORA_NAMES32
#undef FUSED_LORA_NAMES16
#undef FUSED_LORA_NAMES8
#undef FUSED_LORA_D128
#undef FUSED_LORA_D64
#undef FUSED_LORA_D32
#undef FUSED_LORA_D16
#undef FUSED_LORA_D8

}  // namespace fused_lora::ptx
