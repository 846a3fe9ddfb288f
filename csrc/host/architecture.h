// Which kernels a device gets: csrc/sm90's are for compute capability 9.0, csrc/sm80's for 8.x.
#pragma once

#include "../work/plan.h"

namespace fused_lora {

struct Kernels {
  decltype(sm80::plan_pass)* plan_pass;
  decltype(sm80::tile_of)* tile_of;
  decltype(sm80::launch_forward)* launch_forward;
  decltype(sm80::launch_backward)* launch_backward;
};

int count_devices();
int current_index();

// Makes a device current for this runtime: it may be another one than torch's, and what a thread has set in one, the other need
// not know.
void use_device(int device);

// The device `device`; capability 0 if it cannot be asked.
Card card_of(int device);
Card current_card();

// Null where none is offered.
const Kernels* kernels_of(const Card& card);

// From now on cards of compute capability 9.0 play one of 8.0 or 8.6: its kernels, in its shared memory. For tests and
// measurements; with 0, cards are themselves again.
void play_as(int capability);

}  // namespace fused_lora
