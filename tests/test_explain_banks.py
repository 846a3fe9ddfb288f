"""explain() of a LoRABank: which backend rows with adapters of their own get, and why."""

import pytest
import torch

from fused_lora import LoRABank, backends, choices, explain
from tests.cards import CUDA, pretend_extension
from tests.kernels.problem import DEVICE


def make_bank(dtype=torch.bfloat16, ranks=(8, 100)):
    bank = LoRABank(512, 256, dtype=dtype, device=DEVICE)
    for number, r in enumerate(ranks):
        bank.add_adapter(f"adapter {number}", r)
    return bank


@pytest.mark.interpreter
def test_triton():
    with backends.forcing("triton"):
        told = explain(make_bank(), tokens=1000)
    assert told.backend == "triton"
    assert told.shape == (1000, 512, 256, 100)
    assert [name for name, _, _ in told.forward] == ["segments_shrink_kernel", "segments_expand_kernel"]
    assert "segments_factor_grads_kernel" in str(told)
    assert "2 adapters, each row by its own; FUSED_LORA_BACKEND=triton" in str(told)


def test_plain_torch():
    told = explain(make_bank(torch.float64))
    assert (told.backend, told.forward) == ("reference", ())
    assert "2 adapters: no kernel for" in told.reason


def test_a_bank_without_adapters():
    with backends.forcing("reference"):
        assert explain(make_bank(ranks=())).backend == "reference"


def test_of_a_card(card, monkeypatch):
    """csrc where it has a kernel, else Triton with the reason, and what is forced."""
    card(86)
    args = (CUDA, torch.bfloat16, 64)
    assert choices.choose_segments(*args, True, False) == backends.Choice("triton", "not built")
    assert choices.choose_segments(CUDA, torch.float64, 64, True, False).name == "reference"
    for forced, name in (("triton", "triton"), ("addmm", "reference"), ("reference", "reference")):
        with backends.forcing(forced):
            assert choices.choose_segments(*args, True, False).name == name
    pretend_extension(monkeypatch)
    monkeypatch.setattr(backends, "extension_obstacle", lambda: None)
    card(86)
    assert choices.choose_segments(*args, True, False).name == "cuda"
    unreadable = choices.choose_segments(*args, False, False)
    assert unreadable.name == "triton"
    assert "not adjacent" in unreadable.reason
    assert choices.choose_segments(CUDA, torch.float32, 64, True, False).name == "triton"
    dropping = choices.choose_segments(*args, True, True)
    assert dropping == backends.Choice("triton", "csrc has no dropout where rows have adapters of their own")
