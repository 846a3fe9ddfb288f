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

    A generator would take twice as long. The device is set even where it seems to be current: in a thread of autograd's
    torch only means to set it, and Triton needs the context that comes with that.
    """

    __slots__ = ("_device", "_name")

    def __init__(self, name: str, tensor: torch.Tensor):
        self._name = f"fused_lora.{name}"
        self._device = torch.cuda.device(tensor.device.index) if tensor.is_cuda else None

    def __enter__(self) -> None:
        if self._device is not None:
            torch.cuda.nvtx.range_push(self._name)
            self._device.__enter__()

    def __exit__(self, *error) -> None:
        if self._device is not None:
            self._device.__exit__(*error)
            torch.cuda.nvtx.range_pop()
