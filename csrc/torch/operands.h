// Tensors as the launchers of LoRA linears read them.
#pragma once

#include <algorithm>
#include <cmath>

#include "../fill_up.h"
#include "../lora_linear.h"
#include "parts.h"

namespace fused_lora {

// Of a matrix with `cols` columns: elements from one row to the next, as in padding.py.
inline int64_t padded(int64_t cols) {
  const int64_t wide = (cols + 63) / 64 * 64;
  return (wide - cols) * 16 <= cols ? wide : (cols + 7) / 8 * 8;
}

constexpr int64_t kMostRows = (int64_t{1} << 31) - 256;  // the kernels count them in an int

// (M, cols) with padded rows, the last one too: kernels read 8 columns at once, and write pairs.
inline Tensor padded_rows(int64_t M, int64_t cols, const Tensor& like, ScalarType dtype) {
  const int64_t sizes[] = {M, padded(cols)};
  const Tensor rows = empty(sizes, like, dtype);
  return cols == padded(cols) ? rows : first_columns(rows, cols);
}
inline Tensor padded_like(const Tensor& x, int64_t M, int64_t cols) { return padded_rows(M, cols, x, x.scalar_type()); }

inline bool addressable(const Tensor& matrix) {
  return matrix.stride(1) == 1 && matrix.stride(0) % 8 == 0 && matrix.stride(0) >= matrix.size(1) && matrix.stride(0) <= kMostStride &&
         reinterpret_cast<uintptr_t>(matrix.data_ptr()) % 16 == 0;
}

// Whether its memory goes on to the end of the last row's last 8 elements, which are read at once.
inline bool ends_whole(const Tensor& matrix) {
  const int64_t cols = matrix.size(1);
  if (cols % 8 == 0) return true;
  const int64_t last = matrix.storage_offset() + (matrix.size(0) - 1) * matrix.stride(0);
  return (last + (cols + 7) / 8 * 8) * bytes_of_element(matrix) <= bytes_of_storage(matrix);
}

// A matrix in `dtype` that kernels can address: the matrix itself, or a copy with padded rows.
inline Tensor addressed(const Tensor& matrix, ScalarType dtype) {
  if (matrix.numel() == 0 || (matrix.scalar_type() == dtype && addressable(matrix) && ends_whole(matrix))) return matrix;
  Tensor copy = padded_rows(matrix.size(0), matrix.size(1), matrix, dtype);
  if (matrix.scalar_type() == dtype && matrix.stride(1) == 1) {
    check_cuda(launch_fill_up(matrix.data_ptr(), matrix.stride(0), copy.data_ptr(), copy.stride(0), copy.size(0), copy.size(1),
                              stream_of(matrix)));
  } else {
    copy_into(copy, matrix);
  }
  return copy;
}

// (..., C) as a matrix.
inline Tensor flat(const Tensor& tensor) {
  if (tensor.dim() == 2) return tensor;
  const int64_t sizes[] = {-1, tensor.size(-1)};
  return reshaped(tensor, sizes);
}

// The same, such that the copy engine can address it: for what several parts read, which then is copied once.
inline Tensor rows_of(const Tensor& tensor) { return addressed(flat(tensor), tensor.scalar_type()); }

inline Operand operand_of(const Tensor& matrix) {
  return {matrix.data_ptr(), dtype_of("a matrix", matrix), matrix.size(0), matrix.size(1), matrix.stride(0)};
}

// A tensor of any shape as rows of `cols` elements, contiguous; without elements it is not wanted, and only its format counts.
inline Operand dense_operand(const Tensor& tensor, int64_t cols) {
  const int64_t rows = cols == 0 ? 0 : tensor.numel() / cols;
  return {rows == 0 ? nullptr : tensor.data_ptr(), dtype_of("a result", tensor), rows, cols, cols};
}

// Operands of a launch as the kernels read them, and the copies that this takes until it is issued.
class Readable {
 public:
  explicit Readable(ScalarType dtype) : dtype_(dtype) { kept_.reserve(8 * kMostParts); }
  Operand operator()(const Tensor& matrix) { return keep(addressed(matrix, dtype_)); }
  Operand keep(const Tensor& matrix) {
    check(matrix.size(0) == 0 || matrix.stride(0) <= kMostStride, "the CUDA kernels read rows of at most 2^22 elements, got ", matrix.stride(0),
          "; with FUSED_LORA_BACKEND=triton they may be longer");
    return operand_of(kept_.emplace_back(matrix));
  }

 private:
  ScalarType dtype_;
  std::vector<Tensor> kept_;
};

inline Dropout dropout_of(const std::optional<Tensor>& seed, double p) {
  if (!seed) return {nullptr, 0, 1.0f};
  check(seed->scalar_type() == ScalarType::Long && seed->is_cuda(), "seed must be an int64 on the device");
  const bool keeps = p > 31.0 / 32;
  const auto picked = static_cast<uint32_t>(std::nearbyint((keeps ? 1 - p : p) * 0x8000));
  return {static_cast<const int64_t*>(seed->data_ptr()), (0x7C01 - picked) | uint32_t{keeps} << 16, p == 1 ? 0.0f : static_cast<float>(1 / (1 - p))};
}

inline Activation activation_of(const std::vector<double>& act) {
  check(act.size() == 2, "act must be two numbers, got ", act.size());
  return {static_cast<float>(act[0]), static_cast<float>(act[1])};
}

}  // namespace fused_lora
