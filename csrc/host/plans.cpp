#include "plans.h"

#include <map>
#include <mutex>
#include <vector>

#include "capture.h"
#include "check.h"

namespace fused_lora {
namespace {

// Lists of many sizes, such as batches of any length make, are thrown away together when they are more.
constexpr size_t kMostBytes = 64 << 20;

size_t bytes_of(const work::Plan& plan) { return plan.items.size() * sizeof(work::Item); }

std::shared_ptr<const Planned> make(const work::Pass& pass, const Kernels& kernels, const Card& card, bool captured) {
  auto made = std::make_unique<Planned>(Planned{kernels.plan_pass(pass, card), nullptr, &kernels});
  const size_t bytes = bytes_of(made->plan);
  if (bytes > 0) {
    const RelaxedCapture relaxed;
    made->list = static_cast<work::Item*>(allocate(bytes, captured));
    fill_now([&](cudaStream_t stream) {
      return cudaMemcpyAsync(made->list, made->plan.items.data(), bytes, cudaMemcpyHostToDevice, stream);
    });
  }
  // cudaFree waits for launches that still read the list.
  return {made.release(), [](const Planned* gone) {
            const RelaxedCapture relaxed;  // another thread may be capturing
            cudaFree(gone->list);
            delete gone;
          }};
}

struct Device {
  std::mutex mutex;
  using Key = std::pair<int, work::Pass::Key>;  // a capability, as which the device may be played, and a pass
  std::map<Key, std::shared_ptr<const Planned>> plans;
  size_t bytes = 0;
  std::vector<std::shared_ptr<const Planned>> captured;
};

Device& current_device() {
  static auto& devices = *new std::vector<Device>(count_devices());  // never freed: the driver may be gone by then
  return devices.at(current_index());
}

}  // namespace

std::shared_ptr<const Planned> planned(const work::Pass& pass, bool captured) {
  Device& device = current_device();
  const Card card = current_card();
  const Kernels* kernels = kernels_of(card);
  check(kernels != nullptr, "csrc has no kernels for compute capability ", card.capability / 10, ".", card.capability % 10);
  const Device::Key key{card.capability, pass.key()};
  const std::lock_guard<std::mutex> lock(device.mutex);
  std::shared_ptr<const Planned>& found = device.plans[key];
  if (found == nullptr) {
    auto made = make(pass, *kernels, card, captured);
    device.bytes += bytes_of(made->plan);
    if (device.bytes > kMostBytes && !captured) {
      device.plans.clear();
      device.bytes = bytes_of(made->plan);
      return device.plans[key] = made;
    }
    found = made;
  }
  if (captured) device.captured.push_back(found);
  return found;
}

}  // namespace fused_lora
