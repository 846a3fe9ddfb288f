// Torch's current stream, asked of its CUDA library where that is loaded: nothing here may need it, or a torch without CUDA could
// not load this extension, and no CUDA header of torch is used, which would need its runtime.
#include <dlfcn.h>

#include "tensor.h"

namespace fused_lora {
namespace {

using CurrentStream = int32_t (*)(int32_t device, void** stream);

CurrentStream find() {
  void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr ? nullptr : reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

}  // namespace

cudaStream_t stream_of(const Tensor& tensor) {
  static const CurrentStream current_stream = find();
  check(current_stream != nullptr, "this torch has no CUDA library that tells its current stream");
  void* stream = nullptr;
  check(current_stream(tensor.get_device(), &stream) == 0, "torch does not tell its current stream");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace fused_lora
