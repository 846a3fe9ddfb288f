"""The torch.library namespace `fused_lora`. Its ops are private: they have no autograd of their own."""

from contextlib import contextmanager

import torch

LIBRARY = torch.library.Library("fused_lora", "DEF")


def define(schema: str, implementation, fake) -> None:
    """One op for CPU and CUDA with its shape function."""
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"fused_lora::{name}", fake, lib=LIBRARY)


@contextmanager
def launching(name: str, tensor: torch.Tensor):
    """Around launches from Python: the tensor's device is current, and Nsight shows a range fused_lora.<name>."""
    if not tensor.is_cuda:
        yield
        return
    torch.cuda.nvtx.range_push(f"fused_lora.{name}")
    try:
        with torch.cuda.device(tensor.device):
            yield
    finally:
        torch.cuda.nvtx.range_pop()
