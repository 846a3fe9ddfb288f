// Launches of csrc/sm80 on the CPU.
#include "sm80/lora_linear.cuh"
#include "sm80/tiling.cuh"
#include "work/halves.h"
#include "work/params.h"

using namespace fused_lora;

namespace {

Card card{};  // the device that is played
bool halves;  // of all items that can be cut
std::vector<int> flags;

Workspace workspace_of(const work::Plan& plan, std::vector<float>& partial) {
  flags.resize(std::max<size_t>(flags.size(), kCounters + plan.flags));  // launches share them, and their marks
  partial.assign(plan.floats(), NAN);
  return {&plan, plan.items.data(), flags.data(), partial.data()};
}

work::Plan plan_of(const work::Pass& pass) {
  if (!halves) return sm80::plan_pass(pass, card);
  work::Plan plan = work::make_plan(pass, sm80::tiling_of(pass, card));
  const int all = static_cast<int>(plan.items.size());
  work::halve(pass, plan, all, all);
  return plan;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaLaunchKernel(const void* entry, dim3 blocks, dim3 threads, void** arguments, size_t bytes, cudaStream_t) {
  using Kernel = void (*)(const sm80::KernelParams);
  const auto kernel = reinterpret_cast<Kernel>(reinterpret_cast<uintptr_t>(entry));
  const auto& p = *static_cast<const sm80::KernelParams*>(arguments[0]);
  return simt::run(blocks.x, threads.x, bytes, [&] { kernel(p); }) ? cudaSuccess : cudaErrorLaunchTimeout;
}

void play_on(int blocks, int bytes, bool in_halves) {
  card = {bytes >= 163 * 1024 ? 80 : 86, blocks, bytes};
  halves = in_halves;
}
size_t size_of_forward() { return sizeof(ForwardParams); }
size_t size_of_backward() { return sizeof(BackwardParams); }
int forward(const ForwardParams* params) {
  const work::Pass pass = work::pass_of(*params);
  std::vector<float> partial;
  const work::Plan plan = plan_of(pass);
  return sm80::launch_forward(*params, workspace_of(plan, partial), nullptr);
}
int backward(const BackwardParams* params) {
  const work::Pass pass = work::pass_of(*params);
  std::vector<float> partial;
  const work::Plan plan = plan_of(pass);
  return sm80::launch_backward(*params, workspace_of(plan, partial), nullptr);
}

}
