#include "architecture.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "check.h"

namespace fused_lora {
namespace {

constexpr Kernels kSm80{sm80::plan_pass, sm80::tile_of, sm80::launch_forward, sm80::launch_backward};
constexpr Kernels kSm90{sm90::plan_pass, sm90::tile_of, sm90::launch_forward, sm90::launch_backward};

std::atomic<int> played{0};

Card ask(int device) {
  int major = 0, minor = 0;
  Card card{};
  const bool answered = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
                        cudaDeviceGetAttribute(&card.sms, cudaDevAttrMultiProcessorCount, device) == cudaSuccess &&
                        cudaDeviceGetAttribute(&card.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess;
  return answered ? Card{10 * major + minor, card.sms, card.shared_bytes} : Card{};
}

std::vector<Card> ask_all() {
  std::vector<Card> cards;
  for (int device = 0; device < count_devices(); ++device) cards.push_back(ask(device));
  return cards;
}

}  // namespace

int count_devices() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess ? devices : 0;
}

int current_index() {
  int device = 0;
  check_cuda(cudaGetDevice(&device));
  return device;
}

void use_device(int device) {
  if (current_index() != device) check_cuda(cudaSetDevice(device));
}

Card card_of(int device) {
  static const std::vector<Card> cards = ask_all();  // once: every call wants to know
  if (device < 0 || device >= static_cast<int>(cards.size())) return {};
  const Card card = cards[device];
  const int capability = played.load(std::memory_order_relaxed);
  if (capability == 0 || card.capability != 90) return card;
  return {capability, card.sms, std::min(card.shared_bytes, (capability == 80 ? 163 : 99) * 1024)};
}

Card current_card() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess ? card_of(device) : Card{};
}

const Kernels* kernels_of(const Card& card) {
  if (card.capability == 90) return &kSm90;
  return card.capability >= 80 && card.capability < 90 ? &kSm80 : nullptr;
}

void play_as(int capability) { played.store(capability); }

}  // namespace fused_lora
