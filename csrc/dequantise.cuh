// Entries of a weight in a format, computed in float32 and rounded once to 16 bits, as fused_lora/formats has them.
#pragma once

#include <cuda_fp8.h>

#include "elements.cuh"
#include "formats.h"

namespace fused_lora {

static __constant__ float kNf4Values[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
    -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// Of which each lane of a warp keeps one.
__device__ __forceinline__ float nf4_value(int lane) { return kNf4Values[lane % 16]; }

constexpr int kNf4Block = 64, kNestedBlock = 256, kNestedValues = 256;

template <Format kFormat>
constexpr bool kIsNf4 = kFormat == Format::kNf4 || kFormat == Format::kNestedNf4;

// One code's number; all lanes of a warp ask together.
template <Format kFormat>
__device__ __forceinline__ float number_of(uint32_t code, float nf4) {
  if constexpr (kIsNf4<kFormat>) return __shfl_sync(~0u, nf4, code & 15);
  if constexpr (kFormat == Format::kInt8) return static_cast<float>(static_cast<int8_t>(code));
  const __half_raw half = __nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(code), __NV_E4M3);
  return __half2float(__half(half));
}

// Of nested NF4, the scale of a block.
__device__ __forceinline__ float nested_scale(const Stored& w, int code, float factor) {
  return __fadd_rn(__fmul_rn(__ldg(w.outer + 1 + code), factor), __ldg(w.outer));
}

template <Format kFormat>
__device__ __forceinline__ float scale_of(const Stored& w, int n, int k) {
  const float* scale = static_cast<const float*>(w.scale);
  const int64_t at = kIsNf4<kFormat> ? (n * w.cols + k) / kNf4Block : (n >> w.row_shift) * w.scale_stride + (k >> w.col_shift);
  if constexpr (kFormat == Format::kNestedNf4) {
    return nested_scale(w, __ldg(static_cast<const uint8_t*>(w.scale) + at), __ldg(w.outer + 1 + kNestedValues + at / kNestedBlock));
  }
  return kFormat == Format::kInt8 ? __fdiv_rn(__ldg(scale + at), 127.0f) : __ldg(scale + at);
}

// One entry, wherever it is.
template <Format kFormat>
__device__ __forceinline__ float entry_of(const Stored& w, int n, int k, float nf4) {
  const uint8_t* codes = static_cast<const uint8_t*>(w.codes);
  const int64_t at = n * w.cols + k;
  const uint32_t code = kIsNf4<kFormat> ? codes[at / 2] >> (at % 2 == 0 ? 4 : 0) : codes[at];
  return number_of<kFormat>(code, nf4) * scale_of<kFormat>(w, n, k);
}

// Eight neighbours in each second row from a first one on, of a weight whose rows are aligned. The rows lie in one block of 128.
template <Format kFormat, typename T>
class EightCodes {
 public:
  using Codes = std::conditional_t<kIsNf4<kFormat>, uint32_t, uint2>;

  struct Loaded {
    Codes codes;
    float scale;   // of nested NF4 a code of 8 bits, and
    float factor;  // its factor
  };

  __device__ __forceinline__ EightCodes(const Stored& w, int n, int k, float nf4) : nf4_(nf4) {
    const int64_t at = n * w.cols + k;
    codes_ = static_cast<const uint8_t*>(w.codes) + (kIsNf4<kFormat> ? at / 2 : at);
    step_ = static_cast<int>(kIsNf4<kFormat> ? w.cols : 2 * w.cols);
    if constexpr (kIsNf4<kFormat>) {
      scale_ = at / kNf4Block;
      scale_step_ = static_cast<int>(w.cols / (kNf4Block / 2));
    } else {
      scale_ = (n >> w.row_shift) * w.scale_stride + (k >> w.col_shift);
      scale_step_ = w.row_shift == 0 ? 2 * static_cast<int>(w.scale_stride) : 0;
    }
  }

  // Of the row that is next. Nothing is made of it yet, so that much can be asked for at once.
  __device__ __forceinline__ Loaded next(const Stored& w) {
    Loaded loaded{__ldg(reinterpret_cast<const Codes*>(codes_)), 0, 0};
    if constexpr (kFormat == Format::kNestedNf4) {
      loaded.scale = __int_as_float(__ldg(static_cast<const uint8_t*>(w.scale) + scale_));
      loaded.factor = __ldg(w.outer + 1 + kNestedValues + scale_ / kNestedBlock);
    } else {
      loaded.scale = __ldg(static_cast<const float*>(w.scale) + scale_);
    }
    codes_ += step_;
    scale_ += scale_step_;
    return loaded;
  }

  __device__ __forceinline__ uint4 made_of(const Stored& w, const Loaded& loaded) const {
    if constexpr (kIsNf4<kFormat>) {
      const float scale = kFormat == Format::kNf4 ? loaded.scale : nested_scale(w, __float_as_int(loaded.scale), loaded.factor);
      return {pair(loaded.codes, 0, scale), pair(loaded.codes, 1, scale), pair(loaded.codes, 2, scale), pair(loaded.codes, 3, scale)};
    } else {
      const float scale = kFormat == Format::kInt8 ? __fdiv_rn(loaded.scale, 127.0f) : loaded.scale;
      return {pair(loaded.codes.x, 0, scale), pair(loaded.codes.x, 1, scale), pair(loaded.codes.y, 0, scale), pair(loaded.codes.y, 1, scale)};
    }
  }

 private:
  // A byte's upper half comes first.
  __device__ __forceinline__ uint32_t pair(uint32_t codes, int byte, float scale) const {
    if constexpr (!kIsNf4<kFormat>) return half_of(codes, byte, scale);
    const float first = __shfl_sync(~0u, nf4_, codes >> (8 * byte + 4) & 15);
    const float second = __shfl_sync(~0u, nf4_, codes >> 8 * byte & 15);
    return pack<T>(first * scale, second * scale);
  }

  static __device__ __forceinline__ uint32_t half_of(uint32_t codes, int half, float scale) {
    if constexpr (kFormat == Format::kInt8) {
      // The byte, with its sign turned, as the last one of 2^23 + 128: one instruction where a conversion takes four times as long.
      const uint32_t turned = codes ^ 0x80808080u;
      const auto number = [&](int i) { return __uint_as_float(__byte_perm(turned, 0x4B000000u, 0x7440 | i)) - 8388736.0f; };
      return pack<T>(number(2 * half) * scale, number(2 * half + 1) * scale);
    } else {
      const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes >> 16 * half), __NV_E4M3);
      const float2 wide = __half22float2(__half2(raw));
      return pack<T>(wide.x * scale, wide.y * scale);
    }
  }

  const float nf4_;
  const uint8_t* codes_;
  int scale_;  // its number
  int step_, scale_step_;
};

// call(a constant) of a weight's format.
template <typename Call>
__device__ __forceinline__ void in_format(Format format, Call call) {
  switch (format) {
    case Format::kFp8: return call(std::integral_constant<Format, Format::kFp8>{});
    case Format::kInt8: return call(std::integral_constant<Format, Format::kInt8>{});
    case Format::kNf4: return call(std::integral_constant<Format, Format::kNf4>{});
    default: return call(std::integral_constant<Format, Format::kNestedNf4>{});
  }
}

}  // namespace fused_lora
