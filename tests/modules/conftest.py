"""Fusions on a CPU, for which no kernels are: computed by plain torch wherever they are asked for."""

import pytest

from fused_lora.modules import lora_mlp, protocol, siblings


def _without_obstacle(monkeypatch, gated: bool):
    real = protocol.obstacle
    monkeypatch.setattr(protocol, "obstacle", lambda *args: None if args[-1] is gated else real(*args))


@pytest.fixture
def groups(monkeypatch):
    """Layers are computed together wherever they may be; the number of parts of each group."""
    seen, real = [], siblings.ops.lora_group
    _without_obstacle(monkeypatch, gated=False)
    monkeypatch.setattr(siblings.ops, "lora_group", lambda x, parts, p: (seen.append(len(parts)), real(x, parts, p))[1])
    return seen


@pytest.fixture
def as_one(monkeypatch):
    """Every MLP is computed as one; the options of each call."""
    calls, real = [], lora_mlp.ops.lora_mlp
    _without_obstacle(monkeypatch, gated=True)
    monkeypatch.setattr(
        lora_mlp.ops, "lora_mlp", lambda x, *args, **options: (calls.append(options), real(x, *args, **options))[1]
    )
    return calls
