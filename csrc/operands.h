// Tensors as the launchers of LoRA linears read them.
#pragma once

#include <algorithm>
#include <cmath>

#include "fill_up.h"
#include "lora_linear.h"
#include "tensors.h"

namespace fused_lora {

// Of a matrix with `cols` columns: elements from one row to the next, as in padding.py.
inline int64_t padded(int64_t cols) {
  const int64_t wide = (cols + 63) / 64 * 64;
  return (wide - cols) * 16 <= cols ? wide : (cols + 7) / 8 * 8;
}

constexpr int64_t kMostRows = (int64_t{1} << 31) - 256;  // the kernels count them in an int

// (M, cols) with padded rows, the last one too: kernels read 8 columns at once, and write pairs.
inline at::Tensor padded_rows(int64_t M, int64_t cols, const at::TensorOptions& options) {
  const at::Tensor rows = at::empty({M, padded(cols)}, options);
  return cols == padded(cols) ? rows : rows.narrow(1, 0, cols);
}
inline at::Tensor padded_like(const at::Tensor& x, int64_t M, int64_t cols) { return padded_rows(M, cols, x.options()); }

inline bool addressable(const at::Tensor& matrix) {
  return matrix.stride(1) == 1 && matrix.stride(0) % 8 == 0 && matrix.stride(0) >= matrix.size(1) && matrix.stride(0) <= kMostStride &&
         reinterpret_cast<uintptr_t>(matrix.data_ptr()) % 16 == 0;
}

// Whether its memory goes on to the end of the last row's last 8 elements, which are read at once.
inline bool ends_whole(const at::Tensor& matrix) {
  const int64_t cols = matrix.size(1);
  if (cols % 8 == 0) return true;
  const int64_t last = matrix.storage_offset() + (matrix.size(0) - 1) * matrix.stride(0);
  return (last + (cols + 7) / 8 * 8) * static_cast<int64_t>(matrix.itemsize()) <= static_cast<int64_t>(matrix.storage().nbytes());
}

// A matrix in `dtype` that kernels can address: the matrix itself, or a copy with padded rows.
inline at::Tensor addressed(const at::Tensor& matrix, at::ScalarType dtype) {
  if (matrix.numel() == 0 || (matrix.scalar_type() == dtype && addressable(matrix) && ends_whole(matrix))) return matrix;
  const at::Tensor copy = padded_rows(matrix.size(0), matrix.size(1), matrix.options().dtype(dtype));
  if (matrix.scalar_type() != dtype || matrix.stride(1) != 1) return copy.copy_(matrix);
  C10_CUDA_CHECK(launch_fill_up(matrix.data_ptr(), matrix.stride(0), copy.data_ptr(), copy.stride(0), copy.size(0), copy.size(1),
                                c10::cuda::getCurrentCUDAStream()));
  return copy;
}

// (..., C) as a matrix.
inline at::Tensor flat(const at::Tensor& tensor) { return tensor.dim() == 2 ? tensor : tensor.reshape({-1, tensor.size(-1)}); }

// The same, such that the copy engine can address it: for what several parts read, which then is copied once.
inline at::Tensor rows_of(const at::Tensor& tensor) { return addressed(flat(tensor), tensor.scalar_type()); }

inline Operand operand_of(const at::Tensor& matrix) {
  return {matrix.data_ptr(), dtype_of("a matrix", matrix), matrix.size(0), matrix.size(1), matrix.stride(0)};
}

// A tensor of any shape as rows of `cols` elements, contiguous; without elements it is not wanted, and only its format counts.
inline Operand dense_operand(const at::Tensor& tensor, int64_t cols) {
  const int64_t rows = cols == 0 ? 0 : tensor.numel() / cols;
  return {rows == 0 ? nullptr : tensor.data_ptr(), dtype_of("a result", tensor), rows, cols, cols};
}

// Operands of a launch as the kernels read them, and the copies that this takes until it is issued.
class Readable {
 public:
  explicit Readable(at::ScalarType dtype) : dtype_(dtype) {}
  Operand operator()(const at::Tensor& matrix) { return keep(addressed(matrix, dtype_)); }
  Operand keep(const at::Tensor& matrix) {
    TORCH_CHECK(matrix.size(0) == 0 || matrix.stride(0) <= kMostStride, "the CUDA kernels read rows of at most 2^22 elements, got ",
                matrix.stride(0), "; with FUSED_LORA_BACKEND=triton they may be longer");
    return operand_of(kept_.emplace_back(matrix));
  }

 private:
  at::ScalarType dtype_;
  c10::SmallVector<at::Tensor, 24> kept_;
};

inline Dropout dropout_of(const std::optional<at::Tensor>& seed, double p) {
  if (!seed) return {nullptr, 0, 1.0f};
  TORCH_CHECK(seed->scalar_type() == at::kLong && seed->is_cuda(), "seed must be an int64 on the device");
  const bool keeps = p > 31.0 / 32;
  const auto picked = static_cast<uint32_t>(std::nearbyint((keeps ? 1 - p : p) * 0x8000));
  return {seed->data_ptr<int64_t>(), (0x7C01 - picked) | uint32_t{keeps} << 16, p == 1 ? 0.0f : static_cast<float>(1 / (1 - p))};
}

inline Activation activation_of(at::ArrayRef<double> act) {
  TORCH_CHECK(act.size() == 2, "act must be two numbers, got ", act.size());
  return {static_cast<float>(act[0]), static_cast<float>(act[1])};
}

}  // namespace fused_lora
