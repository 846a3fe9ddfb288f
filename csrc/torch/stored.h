// A part's weight in a format as kernels are given it: its codes, and the scales that make W of them.
#pragma once

#include "operands.h"

namespace fused_lora {

inline Format format_of(const Part& part) {
  switch (part.weight.scalar_type()) {
    case ScalarType::Float8_e4m3fn: return Format::kFp8;
    case ScalarType::Char: return Format::kInt8;
    case ScalarType::Byte: return part.weight_outer ? Format::kNestedNf4 : Format::kNf4;
    default: fail("codes must be float8_e4m3fn, int8 or uint8, got ", part.weight.scalar_type());
  }
}

inline void check_dense(const char* name, const Tensor& tensor, ScalarType dtype) {
  check(tensor.is_contiguous() && tensor.is_cuda() && tensor.scalar_type() == dtype, name, " must be contiguous ", dtype, " on the device");
}

inline Stored stored_of(const Part& part) {
  if (!part.stored()) return {};
  const Format format = format_of(part);
  const int64_t N = part.N(), K = part.K();
  const Tensor& scale = *part.weight_scale;
  Stored stored{.format = format, .codes = part.weight.data_ptr(), .scale = scale.data_ptr(), .cols = K};
  check(part.weight.is_contiguous(), "codes must be contiguous");
  check_dense("weight_scale", scale, format == Format::kNestedNf4 ? ScalarType::Byte : ScalarType::Float);
  const bool is_nf4 = format == Format::kNf4 || format == Format::kNestedNf4;
  stored.aligned = K % (is_nf4 ? 64 : 8) == 0 && reinterpret_cast<uintptr_t>(stored.codes) % 8 == 0;
  if (is_nf4) {
    const int64_t blocks = (N * K + 63) / 64, factors = (blocks + 255) / 256;
    check(scale.numel() == blocks, "weight_scale must have an entry for each of ", blocks, " blocks, got ", scale.numel());
    if (format == Format::kNf4) return stored;
    check_dense("weight_outer", *part.weight_outer, ScalarType::Float);
    check(part.weight_outer->numel() == 257 + factors, "weight_outer must have 257 and ", factors, " entries, got ", part.weight_outer->numel());
    stored.outer = static_cast<const float*>(part.weight_outer->data_ptr());
    return stored;
  }
  constexpr int kAll = 31;  // rows or columns are fewer than 2^31
  const int64_t across = (K + 127) / 128;
  if (scale.numel() == 1 && scale.dim() == 0) {
    stored.row_shift = stored.col_shift = kAll;
  } else if (scale.numel() == N && (scale.dim() == 1 || scale.size(1) == 1)) {
    stored.col_shift = kAll;
    stored.scale_stride = 1;
  } else {
    check(scale.dim() == 2 && scale.size(0) == (N + 127) / 128 && scale.size(1) == across,
          "weight_scale must be of rows, of blocks of 128 x 128 or one, got ", scale.numel(), " for a weight of ", N, " x ", K);
    stored.row_shift = stored.col_shift = 7;
    stored.scale_stride = across;
  }
  return stored;
}

// Its sizes alone, where it is in a format; what kernels read has x's dtype.
inline Operand sizes_of_stored(const Part& part, const Tensor& x) { return {nullptr, dtype_of("x", x), part.N(), part.K(), 0}; }

}  // namespace fused_lora
