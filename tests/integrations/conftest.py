"""Which calls this package computes."""

import pytest

from fused_lora import ops
from fused_lora.integrations.peft import linear

from ..modules.conftest import as_one, groups  # noqa: F401


@pytest.fixture
def alone(monkeypatch):
    """A list that grows by a word with each call of lora_linear."""
    calls, real = [], ops.lora_linear
    monkeypatch.setattr(ops, "lora_linear", lambda *args: (calls.append("lora_linear"), real(*args))[1])
    return calls


@pytest.fixture
def routed(monkeypatch):
    """The linears that ops.lora_segments computes, on a CPU too, for which no kernels are."""
    monkeypatch.setattr(linear, "kernel_obstacle", lambda *args: None)
    calls, real = [], ops.lora_segments
    monkeypatch.setattr(ops, "lora_segments", lambda x, each: (calls.extend(each), real(x, each))[1])
    return calls
