"""Whole training steps: every arm computes what it should, and one that does not has no speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import steps
from bench.record import summary
from bench.step_arms import ARMS, Arm
from bench.step_cases import FULL, Case, flops
from bench.step_report import entry, merged, step_table
from bench.steps import COMPILED, EAGER, available, check, main
from bench.variants import FLOOR, PACKAGE
from fused_lora.modules import LoRAMLP
from fused_lora.modules.siblings import LoRASiblings

CASE = Case("tiny", 2, 16, blocks=1)
CPU = torch.device("cpu")


def make(name, compiled=False, accumulate=1):
    return Arm.make(CASE, name, CPU, compiled, accumulate)


def test_arms_agree():
    arms = {name: make(name) for name in available(list(ARMS))}
    check(arms)
    assert arms["unfused"].results().keys() == arms[PACKAGE].results().keys()


def test_an_arm_that_is_wrong_has_no_speed():
    arms = {name: make(name) for name in ("unfused", PACKAGE)}
    with torch.no_grad():
        arms[PACKAGE].model.layers[0].mlp.down_proj.lora_B.mul_(2)
    with pytest.raises(AssertionError, match=r"fused_lora: .* unfused has"):
        check(arms)


@pytest.mark.parametrize("name", available(list(ARMS)))
def test_what_an_arm_trains(name):
    arm = make(name)
    trained = {key for key, parameter in arm.model.named_parameters() if parameter.requires_grad}
    assert "embed_tokens.weight" in trained
    assert any("input_layernorm" in key for key in trained)
    assert any("q_proj" in key and "lora" not in key for key in trained) == (name == FULL)
    assert any("lora" in key for key in trained) == (name not in (FLOOR, FULL))
    before = {key: parameter.detach().clone() for key, parameter in arm.model.named_parameters()}
    arm.optimizer.param_groups[0]["lr"] = 0.1  # which shows in 16 bits
    for _ in range(2):
        arm.step()
    changed = {key for key, parameter in arm.model.named_parameters() if not torch.equal(parameter, before[key])}
    assert changed == trained


def test_gradients_of_micro_batches_add_up():
    def gradient(batches):
        arm = make(PACKAGE, accumulate=3)
        arm.batches = [arm.batches[i] for i in batches]
        arm.gradients()
        return arm.model.layers[0].mlp.down_proj.lora_A.grad.float()

    parts = sum(gradient([i]) for i in range(3))
    torch.testing.assert_close(gradient([0, 1, 2]), parts, rtol=0.05, atol=0.05 * parts.abs().max().item())


def test_the_package_fuses_the_blocks():
    layer = make(PACKAGE).model.layers[0]
    assert isinstance(layer.mlp, LoRAMLP)
    assert isinstance(layer.self_attn, LoRASiblings)


def test_flops():
    case = Case("1.3b-5504", 16, 512)
    linear = 4 * 2048**2 + 3 * 2048 * 5504
    rest = 24 * 3 * 512 * 2048 + 3 * 2048 * case.model.vocab_size
    assert flops(case, FULL) == 2 * 8192 * (24 * 3 * linear + rest)
    assert flops(case, FLOOR) == 2 * 8192 * (24 * 2 * linear + rest)
    assert 1.25 < flops(case, FULL) / flops(case, PACKAGE) < 1.31
    assert 0.94 < flops(Case("60m"), FULL) / flops(Case("60m"), PACKAGE) < 1


def test_the_table_compares_with_full_rank_and_adds_the_warm_start():
    case = Case("1.3b")
    arm = summary([1.0, 1.0, 1.5, 1.5]) | {"examples_per_second": 4.0, "tflops": 7.0, "peak_bytes": 2**31}
    modes = {EAGER: {FULL: arm | {"tokens_per_second": 100.0}, PACKAGE: arm | {"tokens_per_second": 400.0}}}
    (row,) = [line for line in step_table(case, modes) if "**fused_lora**" in line]
    # A third of the steps at speed 1 and two thirds at 4 take half of the time.
    assert row == "| **fused_lora** | eager | 400 | 40.0% | 4.0 | 4.00 | 1.28 | 2.00 | 7 | 2.0 |"


def test_runs_of_one_commit_can_be_merged():
    first, second = Case("1.3b"), Case("350m", 48)
    run = {"device": "A GPU", "commit": "abc", "date": "2026-01-01"}
    runs = [
        run | {"command": "one", "cases": [entry(first, {EAGER: {}}), entry(second, {EAGER: {}})]},
        run | {"command": "two", "cases": [entry(first, {COMPILED: {}})]},
    ]
    results = merged(runs)
    assert results["cases"] == [entry(second, {EAGER: {}}), entry(first, {EAGER: {}, COMPILED: {}})]
    assert results["command"] == "one; two"
    with pytest.raises(ValueError, match="one commit, got abc and def"):
        merged([runs[0], runs[1] | {"commit": "def"}])


# Of torch.compile, which looks at .grad of what it traces.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")
def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(steps, "CPU_CASES", (CASE,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    samples = tmp_path / "samples.json"
    options = ["--rounds", "1", "--arms", FULL, PACKAGE, "--samples", str(samples), "--out", str(tmp_path)]
    assert main(options) == 0
    assert "### tiny, 2 x 16, 1 blocks: 1 rounds" in capsys.readouterr().out
    stored = json.loads((tmp_path / "steps.json").read_text())
    assert stored["cases"][0]["modes"][COMPILED][PACKAGE]["tokens_per_second"] > 0
    assert stored["command"] == "python -m bench.steps --rounds 1 --arms full_rank fused_lora"
    with_samples = json.loads(samples.read_text())["cases"][0]["modes"][COMPILED][PACKAGE]
    assert with_samples.pop("samples") == [with_samples["median"]]
    assert with_samples == stored["cases"][0]["modes"][COMPILED][PACKAGE]
    text = (tmp_path / "steps.md").read_text()
    assert main(["--redraw", str(tmp_path / "steps.json"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "steps.md").read_text() == text
    assert (tmp_path / "steps.md").read_text().count("**fused_lora**") == 2
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_two_ranks_with_micro_batches(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bench.steps"]
    options = ["--accumulate", "2", "--rounds", "1", "--modes", EAGER, "--arms", FULL, PACKAGE, "--out", str(tmp_path)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, *options]
    subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, check=True, capture_output=True, timeout=240
    )
    stored = json.loads((tmp_path / "steps.json").read_text())
    assert stored["ranks"] == 2
    assert stored["accumulate"] == 2
    text = (tmp_path / "steps.md").read_text()
    assert "on 2 ranks, 2 micro-batches a step, " in text
    command = "torchrun --nproc-per-node 2 -m bench.steps --accumulate 2 --rounds 1 --modes eager"
    assert f"By `{command} --arms full_rank fused_lora`." in text


@pytest.mark.parametrize(("ranks", "options"), [("2", []), ("1", ["--accumulate", "2"])])
def test_the_best_micro_batch_is_for_one_process(ranks, options, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    with pytest.raises(SystemExit):
        main(["--best", *options])
    assert "--best is for one process" in capsys.readouterr().err


def test_the_best_micro_batch(monkeypatch):
    rates = {2: 100.0, 4: 99.0, 8: 130.0, 16: 128.0}

    def measure(case, mode, names, rounds, device):
        if case.batch > 16:
            raise torch.OutOfMemoryError
        return {names[0]: {"tokens_per_second": rates[case.batch]}}

    monkeypatch.setattr(steps, "measure", measure)
    assert steps.best_batch(CASE, EAGER, PACKAGE, CPU) == (8, 130.0)
    rates[4] = 90.0
    assert steps.best_batch(CASE, EAGER, PACKAGE, CPU) == (2, 100.0)
