"""The torch.library namespace `fused_lora`. Its ops are private: they have no autograd of their own."""

from contextlib import nullcontext

import torch

LIBRARY = torch.library.Library("fused_lora", "DEF")


def define(schema: str, implementation, fake) -> None:
    """One op for CPU and CUDA with its shape function."""
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"fused_lora::{name}", fake, lib=LIBRARY)


def on_device_of(tensor):
    """Kernels launch on the current device: make it the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()
