"""explain() of a LoRABank: which backend rows with adapters of their own get, and why."""

from types import SimpleNamespace

import pytest
import torch

from fused_lora import LoRABank, add_adapter, backends, choices, explain, route, segments, set_adapter
from fused_lora.ops import Part, segmented
from fused_lora.pretrain.llama import Llama, LlamaConfig
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


@pytest.mark.interpreter
def test_triton_with_dropout():
    bank = make_bank()
    bank.set_lora_dropout("adapter 1", 0.1)
    with backends.forcing("triton"):
        assert "DROPOUT" in str(explain(bank))
        assert "DROPOUT" not in str(explain(bank.eval()))


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
    assert dropping.name == "triton"
    assert dropping.reason == "csrc has no dropout where rows have adapters of their own for this card"
    assert "for this card" in choices.gated_segments_obstacle(CUDA, 64, False)
    card(90)
    assert choices.choose_segments(*args, True, True).name == "cuda"
    assert choices.gated_segments_obstacle(CUDA, 64, True).startswith("csrc has no dropout in a gated MLP")


@pytest.mark.parametrize("what", ["a linear that drops", "several levels in float16"])
def test_linears_of_one_x_that_csrc_has_not_all_kernels_for(what, card, monkeypatch):
    """Each is then computed by what it gets by itself, and none of them in plain torch."""
    built = pretend_extension(monkeypatch)
    monkeypatch.setattr(backends, "extension_obstacle", lambda: None)
    monkeypatch.setattr(backends, "csrc", lambda: built)
    card(86)
    dtype = torch.float16 if "float16" in what else torch.bfloat16
    x = SimpleNamespace(device=CUDA, dtype=dtype, numel=lambda: 1)
    part = Part(*(torch.zeros(64, 64, dtype=dtype) for _ in range(2)), torch.zeros(64, 64, dtype=dtype).t())

    def of(levels, thresholds):
        shapes = ((levels, 1, 4), (1, 4), (levels, 256, 2))
        return segmented.Segments(segments.Tables(*map(torch.zeros, shapes)), 64, thresholds)

    one, other = of(1, None), of(2, None) if "float16" in what else of(1, torch.zeros(4))
    assert segmented.in_kernels(x, [part, part], [one, other], False) == [True, True]
    assert [segmented.backend(x, part, each) for each in (one, other)] == ["cuda", "triton"]
    with backends.forcing("cuda"):
        assert [segmented.backend(x, part, each) for each in (one, other)] == ["cuda", "reference"]
        assert segmented.in_kernels(x, [part, part], [one, other], False) == [True, False]
    card(90)
    assert segmented.backend(x, part, other) == ("triton" if "float16" in what else "cuda")
    assert segmented.obstacle(CUDA, dtype, [part, part], [one, other], False) is not None


def test_what_is_said_of_a_model_does_not_depend_on_a_route():
    model = Llama(LlamaConfig(32, 48, 2, 2, vocab_size=61))
    add_adapter(model, "a", 4, 8.0, target_modules="all-linear")
    told = str(explain(model, tokens=64))
    assert "called with one x, computed one by one: no kernel" in told
    set_adapter(model, "a")
    assert str(explain(model, tokens=64)) == told
    with route(model, ["a", "__base__"]):
        assert str(explain(model, tokens=64)) == told
    with route(model, ["a", "__base__"], rows=[32, 32]):
        assert str(explain(model, tokens=64)) == told
