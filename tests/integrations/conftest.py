"""Which calls this package computes."""

import pytest

from fused_lora import ops

from ..modules.conftest import as_one, groups  # noqa: F401


@pytest.fixture
def alone(monkeypatch):
    """A list that grows by a word with each call of lora_linear."""
    calls, real = [], ops.lora_linear
    monkeypatch.setattr(ops, "lora_linear", lambda *args: (calls.append("lora_linear"), real(*args))[1])
    return calls
