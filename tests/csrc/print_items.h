// A list's items as items.py reads them: nine numbers each, a line in all.
#pragma once

#include <cstdio>
#include <vector>

#include "../../csrc/work/item.h"

inline void print_items(const std::vector<fused_lora::work::Item>& items) {
  for (const auto& item : items) {
    std::printf(" %d %d %d %d %d %d %d %d %d", static_cast<int>(item.work), item.bits, item.part, item.row, item.rows, item.col, item.waits,
                item.raises, item.rank);
  }
  std::printf("\n");
}
