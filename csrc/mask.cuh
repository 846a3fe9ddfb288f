// Dropout's mask where it is needed, never stored: a hash of (seed, row, group of 8 columns) of x, of whose four words each half
// is a uniform number of 16 bits; an entry is kept where its own is at or above the threshold. As in fused_lora/reference.py.
#pragma once

#include <cstdint>

#include "lora_linear.h"
#include "ptx/bits.cuh"

namespace fused_lora {

class Mask {
 public:
  struct RowKey {
    uint32_t in, mid;
  };

  __device__ explicit Mask(const Dropout& dropout) {
    const uint64_t seed = *dropout.seed;
    first_ = mix(static_cast<uint32_t>(seed) + kGolden);
    second_ = mix((first_ ^ static_cast<uint32_t>(seed >> 32)) + kGolden);
    const uint32_t t = dropout.threshold;
    add_ = (t <= 0x8000 ? 0x8000 - t : 0x10000 - t) * 0x10001;
    either_ = t <= 0x8000 ? ~0u : 0;
  }

  __device__ RowKey row_key(uint32_t row) const {
    const uint32_t in = mix(mix(row ^ first_) + second_);
    return {in, mix(in + kGolden)};
  }

  // Another lane's.
  static __device__ RowKey of_lane(RowKey key, int lane) { return {__shfl_sync(~0u, key.in, lane), __shfl_sync(~0u, key.mid, lane)}; }

  // Of columns 8 group to 8 group + 7.
  static __device__ uint32_t group_key(RowKey row, uint32_t group) { return fold(row.in ^ group * kGolden, kFirst) ^ row.mid; }

  // Of columns 2 i and 2 i + 1 of a group, the bits of 16-bit entries that stay.
  __device__ uint32_t kept_bits(uint32_t group_key, int i) const { return kept(fold(group_key ^ flip(i), factor(i))); }

 private:
  static constexpr uint32_t kGolden = 0x9E3779B9, kFirst = 0x7FEB352D, kSecond = 0x846CA68B;
  static constexpr __device__ uint32_t flip(int i) {
    return i == 0 ? 0x243F6A88 : i == 1 ? 0x85A308D3 : i == 2 ? 0x13198A2E : 0x03707344;
  }
  static constexpr __device__ uint32_t factor(int i) {
    return i == 0 ? 0xA0761D65 : i == 1 ? 0xE7037ED1 : i == 2 ? 0x8EBC6AF1 : 0x589965CD;
  }

  static __device__ uint32_t mix(uint32_t h) {
    h = (h ^ h >> 16) * kFirst;
    h = (h ^ h >> 15) * kSecond;
    return h ^ h >> 16;
  }

  // The halves of a product of 64 bits, one over the other.
  static __device__ uint32_t fold(uint32_t a, uint32_t b) {
    const uint64_t product = ptx::wide_product(a, b);
    return static_cast<uint32_t>(product >> 32) ^ static_cast<uint32_t>(product);
  }

  // Both halves at once: with 2^15 - t added to the lower 15 bits, the highest one says whether they are at or above t.
  __device__ uint32_t kept(uint32_t word) const {
    const uint32_t sum = (word & 0x7FFF7FFF) + add_;
    return ptx::spread_signs(ptx::majority(sum, word, either_));
  }

  uint32_t first_, second_, add_, either_;
};

}  // namespace fused_lora
