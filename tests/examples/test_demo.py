"""The demo end to end at a size of seconds, its verdict, and its command line."""

import dataclasses
import math
import sys

import pytest
import torch

import fused_lora
from examples import demo
from examples.config import cpu_config, gpu_config
from examples.report import DemoResult
from examples.training import Schedule, TrainingRun
from examples.unfused import UnfusedLoRALinear, unfused_twin
from fused_lora import backends
from fused_lora.pretrain import python_text
from fused_lora.pretrain.llama import Llama, LlamaConfig

TINY = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


def tiny_config(device: str, dtype: torch.dtype):
    """The bounds and the rest of what this kind of device gets, at a tiny size."""
    return dataclasses.replace(
        cpu_config() if dtype is torch.float32 else gpu_config(),
        device=torch.device(device),
        dtype=dtype,
        llama=TINY,
        r=8,
        warm_start=Schedule(steps=10, batch_size=4, seq_len=32, learning_rate=1e-2),
        lora=Schedule(steps=40, batch_size=4, seq_len=32, learning_rate=5e-3, seed=1),
        relora=Schedule(steps=24, batch_size=4, seq_len=32, learning_rate=5e-3, seed=1),
        relora_cycles=3,
        held_out_tokens=512,
    )


def tiny_result(**changes) -> DemoResult:
    run = TrainingRun(torch.tensor([2.0, 1.5]), tokens_per_second=1.0, peak_memory=None)
    spectra = {"lora_spectrum": torch.ones(128) * (torch.arange(128) < 16), "relora_spectrum": torch.ones(128)}
    found = {"merge_difference": 1e-6, "logit_scale": 10.0, "relora_perplexity": 2.0, "longer_side": 128}
    return DemoResult(run, run, 3.0, 2.0, 2.0, 2.0, **(found | spectra | changes))


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
def test_demo_end_to_end(device, dtype, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        python_text, "docstrings", python_text.language_reference
    )  # parsing the standard library takes seconds
    config = tiny_config(device, dtype)
    result = demo.run_demo(config, *demo.load_text(None, config), tmp_path / "output")
    assert (tmp_path / "output" / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "output" / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    assert result.disagreements(config) == []
    assert result.ranks[1] == 24, "three cycles of r = 8"
    assert result.relora_perplexity < result.base_perplexity
    assert result.fused.losses.shape == result.unfused.losses.shape == (40,)
    assert result.fused_perplexity < result.base_perplexity
    assert result.merged_perplexity == pytest.approx(result.fused_perplexity, rel=config.max_merge_difference)
    printed = capsys.readouterr().out
    assert "replaced 14 linear layers, left 1" in printed
    in_plain_torch = backends.choose(config.device, dtype).name == "reference"
    assert ("ran in plain torch here" in printed) == in_plain_torch
    assert ("not measured" in printed) == (device == "cpu")


def test_twin_computes_the_same_and_shares_nothing():
    model = Llama(TINY).requires_grad_(False)
    fused_lora.replace_linear(model, r=4, lora_alpha=8.0, target_modules=demo.TARGET_MODULES)
    for module in model.modules():
        if isinstance(module, fused_lora.LoRALinear):
            torch.nn.init.normal_(module.lora_B)
    twin = unfused_twin(model)
    tokens = torch.randint(256, (2, 9))
    torch.testing.assert_close(twin(tokens), model(tokens))
    assert sum(isinstance(module, UnfusedLoRALinear) for module in twin.modules()) == 14
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}
    trains = [name for name, p in twin.named_parameters() if p.requires_grad]
    assert trains == [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("loss", [1.51, math.nan])
def test_losses_that_differ_are_a_disagreement(loss):
    run = TrainingRun(torch.tensor([2.0, loss]), tokens_per_second=1.0, peak_memory=None)
    (sentence,) = dataclasses.replace(tiny_result(), fused=run).disagreements(cpu_config())
    assert "the losses of the fused and the unfused run differ" in sentence


@pytest.mark.parametrize("difference", [0.1, math.nan])
def test_a_merge_that_moves_logits_is_a_disagreement(difference):
    result = dataclasses.replace(tiny_result(), merge_difference=difference)
    (sentence,) = result.disagreements(cpu_config())
    assert "merging moved a logit" in sentence


def test_a_change_within_rank_r_is_a_disagreement():
    (sentence,) = tiny_result(relora_spectrum=tiny_result().lora_spectrum).disagreements(cpu_config())
    assert "no singular values beyond rank 16" in sentence


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["demo", *map(str, arguments)])
    demo.main()


def test_main_trains_on_the_text_that_it_is_given(tmp_path, monkeypatch):
    (tmp_path / "text").write_bytes(b"x" * 20_000)
    seen = {}
    monkeypatch.setattr(
        demo, "run_demo", lambda config, tokens, held_out, output: seen.update(tokens=tokens) or tiny_result()
    )
    run_main(monkeypatch, "--text", tmp_path / "text")
    assert seen["tokens"].tolist() == [ord("x")] * 18_000


def test_main_fails_when_the_runs_disagree(tmp_path, monkeypatch):
    result = dataclasses.replace(tiny_result(), merge_difference=math.nan)
    monkeypatch.setattr(demo, "run_demo", lambda *_: result)
    with pytest.raises(SystemExit, match="FAILED: merging moved a logit"):
        run_main(monkeypatch)


def test_main_refuses_a_short_or_missing_text(tmp_path, monkeypatch, capsys):
    (tmp_path / "short").write_text("too short")
    for name, message in (("short", "the text needs at least"), ("missing", "No such file")):
        with pytest.raises(SystemExit, match="2"):
            run_main(monkeypatch, "--text", tmp_path / name)
        assert message in capsys.readouterr().err
