// Dropout's mask where it is needed, never stored: a hash of (seed, row, group of 32 columns) of x, times a factor for each pair of
// columns. The product's upper 32 bits, exclusive or its lower ones, are two numbers of 15 bits: of the first and the second column.
// Those of an interval are dropped, as in fused_lora/reference.py.
#pragma once

#include <cstdint>

#include "lora_linear.h"
#include "ptx/bits.cuh"

namespace fused_lora {

class Mask {
 public:
  static constexpr int kGroup = 32, kPairs = kGroup / 2;  // columns
  static constexpr uint32_t kDropsAll = 0x17C01;          // a threshold: no number is picked, and what is picked is kept

  // Which numbers are dropped.
  struct Picked {
    uint32_t first, flip;  // 0x7C01 is no number: nothing is above it, and nothing picked

    __device__ explicit Picked(uint32_t threshold) : first((threshold & 0xFFFF) * 0x10001), flip(threshold > 0xFFFF ? 0 : ~0u) {}
  };

  __device__ explicit Mask(const Dropout& dropout) : Mask(*dropout.seed, dropout.threshold) {}

  // Without a threshold each row has one of its own.
  __device__ explicit Mask(uint64_t seed, uint32_t threshold = 0) : picked_(threshold) {
    first_ = mix(static_cast<uint32_t>(seed) + kGolden);
    second_ = mix((first_ ^ static_cast<uint32_t>(seed >> 32)) + kGolden);
  }

  __device__ uint32_t row_key(uint32_t row) const { return mix(mix(row ^ first_) + second_); }

  // Of columns kGroup group on.
  static __device__ uint32_t group_key(uint32_t row_key, uint32_t group) { return fold(row_key ^ group * kGolden, kFirst); }

  // Of a group's pair of columns.
  static __device__ uint32_t factor(uint32_t pair) { return (pair * kGolden ^ 0xC2B2AE35) | 1; }

  // The bits of 16-bit entries that stay, of the pair that has this factor.
  __device__ uint32_t kept_bits(uint32_t group_key, uint32_t factor) const { return kept_bits(group_key, factor, picked_); }
  static __device__ uint32_t kept_bits(uint32_t group_key, uint32_t factor, const Picked& picked) {
    return ptx::at_or_above(fold(group_key, factor) & 0x7FFF7FFF, picked.first) ^ picked.flip;
  }

 private:
  static constexpr uint32_t kGolden = 0x9E3779B9, kFirst = 0x7FEB352D, kSecond = 0x846CA68B;

  static __device__ uint32_t mix(uint32_t h) {
    h = (h ^ h >> 16) * kFirst;
    h = (h ^ h >> 15) * kSecond;
    return h ^ h >> 16;
  }

  static __device__ uint32_t fold(uint32_t a, uint32_t b) {
    const uint64_t product = ptx::wide_product(a, b);
    return static_cast<uint32_t>(product >> 32) ^ static_cast<uint32_t>(product);
  }

  uint32_t first_, second_;
  Picked picked_;
};

}  // namespace fused_lora
