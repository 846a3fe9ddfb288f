// A list's workers, who take what comes next whenever they are free. Host code; times are in whatever the list's are.
#pragma once

#include <algorithm>
#include <functional>
#include <queue>
#include <vector>

namespace fused_lora::work {

class Workers {
 public:
  explicit Workers(int count) {
    for (int i = 0; i < count; ++i) free_.push(0);
  }

  // When the next one of them is free, and until when it then works.
  double next() const { return free_.top(); }
  void work_until(double done) {
    free_.pop();
    free_.push(done);
    end_ = std::max(end_, done);
  }

  double end() const { return end_; }

 private:
  std::priority_queue<double, std::vector<double>, std::greater<double>> free_;
  double end_ = 0;
};

}  // namespace fused_lora::work
