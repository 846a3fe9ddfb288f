"""A CUDA device that torch pretends to have, with a folder of its own for what is measured."""

import types
from contextlib import contextmanager

import pytest
import torch

from fused_lora import backends, choices
from fused_lora.extension import Extension

CUDA = torch.device("cuda", 0)


class Properties:
    """What torch tells of a GPU."""

    def __init__(self, capability, shared_memory=101376):
        self.name = f"Card {capability}"
        self.major, self.minor = divmod(capability, 10)
        self.multi_processor_count, self.total_memory = 80, 2**34
        self.shared_memory_per_block_optin = shared_memory


def forget():
    """As in a new process."""
    for function in (
        backends._gpu, backends._choose, backends._choose_lora_linear, choices.measured, choices.any_measured,
        choices._choose, choices._together_obstacle, choices._choose_segments,
    ):  # fmt: skip
        function.cache_clear()


def pretend_extension(monkeypatch):
    """csrc, as much of it as choices ask, with kernels for ranks up to 256."""
    built = types.SimpleNamespace(rank_obstacle=lambda r: "r is above 256" if r > 256 else "")
    monkeypatch.setattr(backends, "extension", lambda: Extension(built, "pretended"))
    return built


@contextmanager
def pretended(monkeypatch, cache):
    """A function that makes the one CUDA device report a capability, with everything in place to use it but csrc."""
    pytest.importorskip("triton")
    for name in ("FUSED_LORA_BACKEND", "FUSED_LORA_AUTOTUNE", "FUSED_LORA_AS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FUSED_LORA_CACHE_DIR", str(cache))
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    monkeypatch.setattr(backends, "extension_obstacle", lambda: "not built")
    monkeypatch.setattr(backends, "host_compiler", lambda: "/usr/bin/cc")

    def pretend(capability, **options):
        properties = Properties(capability, **options)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties.name)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.version, "hip", None)
        forget()

    yield pretend
    monkeypatch.undo()
    forget()
