"""The torch.library namespace `fused_lora`. Its ops are private: they have no autograd of their own."""

import torch

LIBRARY = torch.library.Library("fused_lora", "DEF")


def define(schema: str, implementation, fake) -> None:
    """One op for CPU and CUDA with its shape function."""
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"fused_lora::{name}", fake, lib=LIBRARY)


class launching:
    """Around launches from Python: the tensor's device is current, and Nsight shows a range fused_lora.<name>.
    As a generator it would take twice as long."""

    __slots__ = ("_device", "_name")

    def __init__(self, name: str, tensor: torch.Tensor):
        device = tensor.device
        self._name = f"fused_lora.{name}" if tensor.is_cuda else None
        elsewhere = self._name and device.index != torch.cuda.current_device()
        self._device = torch.cuda.device(device) if elsewhere else None

    def __enter__(self) -> None:
        if self._name:
            torch.cuda.nvtx.range_push(self._name)
        if self._device:
            self._device.__enter__()

    def __exit__(self, *error) -> None:
        if self._device:
            self._device.__exit__(*error)
        if self._name:
            torch.cuda.nvtx.range_pop()
