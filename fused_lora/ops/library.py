"""The torch.library namespace of this package. Its ops are private: they have no autograd of their own."""

import threading

import torch

# `fused_lora`, but where the package was loaded under another name.
NAMESPACE = __name__.partition(".")[0]
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
ops = getattr(torch.ops, NAMESPACE)


def define(schema: str, implementation, fake) -> None:
    """One op for CPU and CUDA with its shape function."""
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


class _Thread(threading.local):
    def __init__(self):
        self.bound: set[int] = set()  # devices


_thread = _Thread()


def _bind(device: int) -> None:
    """Gives this thread the context of a device that is current. Torch lets a thread of autograd's be without one until
    it needs it, and Triton's descriptors do not ask."""
    torch.cuda.mem_get_info(device)
    _thread.bound.add(device)


class launching:
    """Around launches from Python: the tensor's device is current, and Nsight shows a range fused_lora.<name>. As a
    generator it would take twice as long."""

    __slots__ = ("_device", "_name")

    def __init__(self, name: str, tensor: torch.Tensor):
        self._name = f"fused_lora.{name}"
        self._device = torch.cuda.device(tensor.device.index) if tensor.is_cuda else None

    def __enter__(self) -> None:
        if self._device is None:
            return
        torch.cuda.nvtx.range_push(self._name)
        self._device.__enter__()
        if self._device.idx not in _thread.bound:
            _bind(self._device.idx)

    def __exit__(self, *error) -> None:
        if self._device is not None:
            self._device.__exit__(*error)
            torch.cuda.nvtx.range_pop()
