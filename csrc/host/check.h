// Errors, which Python sees as RuntimeErrors.
#pragma once

#include <cuda_runtime_api.h>

#include <sstream>
#include <stdexcept>

namespace fused_lora {

template <typename... Words>
[[noreturn]] void fail(const Words&... words) {
  std::ostringstream text;
  (text << ... << words);
  throw std::runtime_error(text.str());
}

// The words are only put together where they are needed.
template <typename... Words>
void check(bool holds, const Words&... words) {
  if (!holds) fail(words...);
}

void check_cuda(cudaError_t error);

}  // namespace fused_lora
