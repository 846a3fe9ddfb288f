// Tensors as the launchers of the LoRA linear read them.
#pragma once

#include <algorithm>
#include <cmath>

#include "fill_up.h"
#include "flags.h"
#include "lora_linear.h"
#include "nvtx_range.h"
#include "tensors.h"

namespace fused_lora {

// Of a matrix with `cols` columns: elements from one row to the next, as in padding.py.
inline int64_t padded(int64_t cols) {
  const int64_t wide = (cols + 63) / 64 * 64;
  return (wide - cols) * 16 <= cols ? wide : (cols + 7) / 8 * 8;
}

constexpr int64_t kMostRows = (int64_t{1} << 31) - 256;  // the kernels count them in an int

inline bool addressable(const at::Tensor& matrix) {
  return matrix.stride(1) == 1 && matrix.stride(0) % 8 == 0 && matrix.stride(0) >= matrix.size(1) &&
         reinterpret_cast<uintptr_t>(matrix.data_ptr()) % 16 == 0;
}

// A matrix in `dtype` that the copy engine can address: the matrix itself, or a copy with padded rows.
inline at::Tensor addressed(const at::Tensor& matrix, at::ScalarType dtype) {
  if (matrix.numel() == 0 || (matrix.scalar_type() == dtype && addressable(matrix))) return matrix;
  const at::Tensor copy = at::empty_strided(matrix.sizes(), {padded(matrix.size(1)), 1}, matrix.options().dtype(dtype));
  if (matrix.scalar_type() != dtype || matrix.stride(1) != 1) return copy.copy_(matrix);
  C10_CUDA_CHECK(launch_fill_up(matrix.data_ptr(), matrix.stride(0), copy.data_ptr(), copy.stride(0), copy.size(0), copy.size(1),
                                c10::cuda::getCurrentCUDAStream()));
  return copy;
}

// (..., C) as a matrix.
inline at::Tensor flat(const at::Tensor& tensor) { return tensor.dim() == 2 ? tensor : tensor.reshape({-1, tensor.size(-1)}); }

// The same, such that the copy engine can address it: for what several parts read, which then is copied once.
inline at::Tensor rows_of(const at::Tensor& tensor) { return addressed(flat(tensor), tensor.scalar_type()); }

// (M, r) with padded rows, the last one too: kernels write pairs of columns.
inline at::Tensor low_like(const at::Tensor& x, int64_t M, int64_t r) {
  const at::Tensor low = at::empty({M, padded(r)}, x.options());
  return r == padded(r) ? low : low.narrow(1, 0, r);
}

inline Matrix matrix_of(const at::Tensor& tensor) { return {tensor.data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0)}; }

// Operands of a launch as the kernels read them, and the copies that this takes until it is issued.
class Readable {
 public:
  explicit Readable(at::ScalarType dtype) : dtype_(dtype) {}
  Matrix operator()(const at::Tensor& matrix) { return keep(addressed(matrix, dtype_)); }
  Matrix keep(const at::Tensor& matrix) { return matrix_of(kept_.emplace_back(matrix)); }

 private:
  at::ScalarType dtype_;
  c10::SmallVector<at::Tensor, 24> kept_;
};

inline Dropout dropout_of(const std::optional<at::Tensor>& seed, double p) {
  if (!seed) return {nullptr, 0, 1.0f};
  TORCH_CHECK(seed->scalar_type() == at::kLong && seed->is_cuda(), "seed must be an int64 on the device");
  const double threshold = std::min(std::nearbyint(p * 4294967296.0), 4294967295.0);
  return {seed->data_ptr<int64_t>(), static_cast<uint32_t>(threshold), p == 1 ? 0.0f : static_cast<float>(1 / (1 - p))};
}

// A forward pass of the linears that read x, but for where its results go.
class ForwardOperands {
 public:
  ForwardOperands(const at::Tensor& x, at::TensorList weights, at::TensorList As, at::TensorList Bs,
                  const c10::List<std::optional<at::Tensor>>& biases, at::TensorList scales, const std::optional<at::Tensor>& seed,
                  double p)
      : read_(x.scalar_type()) {
    TORCH_CHECK(!weights.empty() && weights.size() <= kMostParts, "a group has 1 to ", kMostParts, " linears, got ", weights.size());
    TORCH_CHECK(x.numel() < kMostRows * x.size(-1), "x must have fewer than 2^31 - 256 rows");
    params.x = read_(flat(x));
    params.parts = static_cast<int>(weights.size());
    params.dtype = dtype_of("x", x);
    params.dropout = dropout_of(seed, p);
    for (size_t i = 0; i < weights.size(); ++i) {
      const std::optional<at::Tensor> bias = biases.get(i);
      TORCH_CHECK(!bias || bias->is_contiguous(), "bias must be contiguous, got strides ", bias->strides());
      xas.push_back(low_like(x, params.x.rows, As[i].size(0)));
      params.part[i] = {
          .weight = read_(weights[i]),
          .A = read_(As[i]),
          .B = read_(Bs[i]),
          .xa = matrix_of(xas.back()),
          .y = {},
          .scale = scales[i].data_ptr<float>(),
          .bias = bias ? bias->data_ptr() : nullptr,
          .bias_dtype = bias ? dtype_of("bias", *bias) : DType::kFloat32,
      };
    }
  }

  void launch() {
    params.flags = launch_flags(forward_flags(params));
    const NvtxRange range("forward");
    C10_CUDA_CHECK(launch_lora_linear_forward(params, c10::cuda::getCurrentCUDAStream()));
  }

  ForwardParams params{};
  std::vector<at::Tensor> xas;

 private:
  Readable read_;
};

// A backward pass, but for where the gradient of x goes: parts are added one by one, those without a sum last.
class BackwardOperands {
 public:
  explicit BackwardOperands(const at::Tensor& x) : read_(x.scalar_type()), floats_(x.options().dtype(at::kFloat)) {
    params.dtype = dtype_of("x", x);
  }

  struct Needs {
    bool dA, dB, dbias;
  };

  // dxa is made by this pass where the part is summed, and read by it where not.
  void add(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& A, const at::Tensor& B,
           const at::Tensor& xa, const at::Tensor& dxa, const at::Tensor& scale, const Dropout& dropout, Needs needs,
           at::ScalarType bias_dtype, bool summed = true) {
    const int64_t N = weight.size(0);
    dAs.push_back(at::empty(needs.dA ? A.sizes() : at::IntArrayRef{0}, A.options()));
    dBs.push_back(at::empty(needs.dB ? B.sizes() : at::IntArrayRef{0}, B.options()));
    dbiases.push_back(at::empty({needs.dbias ? N : 0}, x.options().dtype(bias_dtype)));
    params.factor_dtype = dtype_of("A", A);
    params.summed += summed;
    params.part[params.parts++] = {
        .dy = read_(flat(dy)),
        .x = read_(flat(x)),
        .weight = summed ? read_(weight) : Matrix{},
        .A = summed ? read_(A) : matrix_of(A),  // whose sizes alone matter elsewhere
        .B = summed ? read_(B) : matrix_of(B),
        .xa = read_(xa),
        .dxa = read_.keep(dxa),
        .dropout = dropout,
        .dA = needs.dA ? dAs.back().data_ptr() : nullptr,
        .dB = needs.dB ? dBs.back().data_ptr() : nullptr,
        .dbias = needs.dbias ? dbiases.back().data_ptr() : nullptr,
        .bias_dtype = dtype_of("bias", dbiases.back()),
        .scale = scale.data_ptr<float>(),
    };
  }

  Matrix read(const at::Tensor& matrix) { return read_(matrix); }

  // x's gradient, or an empty tensor.
  at::Tensor wants_dx(const at::Tensor& x, bool need) {
    const at::Tensor dx = need ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
    params.needs_dx = need;
    params.dx = {dx.data_ptr(), params.part[0].x.rows, x.size(-1), x.size(-1)};
    return dx;
  }

  void launch() {
    params.partial = static_cast<float*>(read_.keep(at::empty({1, backward_partials(params)}, floats_)).data);
    params.flags = launch_flags(backward_flags(params));
    const NvtxRange range("backward");  // here: ranges are a thread's, and autograd's is another
    C10_CUDA_CHECK(launch_lora_linear_backward(params, c10::cuda::getCurrentCUDAStream()));
  }

  BackwardParams params{};
  std::vector<at::Tensor> dAs, dBs, dbiases;

 private:
  Readable read_;
  at::TensorOptions floats_;
};

}  // namespace fused_lora
