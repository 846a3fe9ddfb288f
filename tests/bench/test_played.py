"""bench --as: what a Hopper card is told to play, the baselines of such cards, and the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import measure, played, played_blocks, timing
from bench.__main__ import main
from bench.block_ways import CPU_BLOCKS, UNFUSED, WAYS, Inputs, build, expected_results, run_block
from bench.check import check_variant, reference_results, relative_error
from bench.measure import MEASURED, UNAVAILABLE
from bench.record import slug
from bench.report import kernel_table
from bench.shapes import FORWARD, FORWARD_BACKWARD, PASSES, Shape
from bench.timing import GRAPH
from bench.variants import FLOOR, PACKAGE, make_problem
from fused_lora import backends

ODD = Shape(M=37, K=29, N=43, r=5)


class TorchProduct:
    """What cublas_sm80.Product does, by torch."""

    made = 0

    def __init__(self, lt, lhs, rhs, out, beta=0.0, alpha=1.0):
        self.tensors, self.beta, self.alpha = (lhs, rhs, out), beta, alpha
        self.layouts = [(tensor.shape, tensor.stride()) for tensor in self.tensors]
        TorchProduct.made += 1

    def tune(self, shared_bytes, flush):
        self.tensors[2].add_(float("nan"))
        self.name = f"fits {shared_bytes}"
        return self

    def __call__(self, lhs, rhs, out):
        assert self.layouts == [(tensor.shape, tensor.stride()) for tensor in (lhs, rhs, out)]
        return torch.addmm(out, lhs, rhs, beta=self.beta, alpha=self.alpha, out=out)


def time_graphs(graphs, rounds):
    """A microsecond a result."""
    return {name: [1e-6 * len(results)] * rounds for name, (_, results) in graphs.items()}


@pytest.fixture
def by_torch(monkeypatch):
    """cuBLAS, graphs and the GPU stood in for; the variables set back at the end."""
    for name in ("FUSED_LORA_AS", "TRITON_OVERRIDE_ARCH"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(played, "Product", TorchProduct)
    monkeypatch.setattr(played, "library", lambda: None)
    monkeypatch.setattr(timing, "capture", lambda call: (None, call()))
    monkeypatch.setattr(timing, "replay_over_nan", lambda graph, results: None)
    monkeypatch.setattr(timing, "time_graphs", time_graphs)


@pytest.mark.parametrize("name", [FLOOR, "addmm"])
def test_a_baseline_is_the_reference(name, by_torch):
    kind, problem = played.variants("sm86")[name], make_problem(ODD, "cpu", torch.float32, seed=3)
    variant = kind.factory(problem)
    check_variant(variant, problem, reference_results(problem, kind.work))
    assert set(variant.kernels.values()) == {"fits 101376"}
    assert {"x W^T", "dy W"} <= set(variant.kernels)


@pytest.mark.parametrize("name", [FLOOR, UNFUSED])
@pytest.mark.parametrize("block", CPU_BLOCKS, ids=str)
def test_a_blocks_baseline_is_the_reference(name, block, by_torch, monkeypatch):
    monkeypatch.setattr(played_blocks, "_swiglu", lambda gate, up: torch.nn.functional.silu(gate) * up)
    for each, way in played_blocks.ways("sm80").items():
        monkeypatch.setitem(WAYS, each, way)
    inputs = Inputs.make(block, torch.device("cpu"), torch.float32)
    expected = expected_results(block, WAYS[name].adapters, inputs)
    results = run_block(build(block, name, torch.device("cpu"), torch.float32), inputs, backward=True)
    for (what, exact), result in zip(expected.items(), results, strict=True):
        assert relative_error(result, exact) < 1e-5, what


def test_the_baselines_share_products_and_keep_no_tensors(by_torch):
    kinds, problem = played.variants("sm80"), make_problem(ODD, "cpu", torch.float32)
    before = TorchProduct.made
    variants = [kinds[name].factory(problem) for name in (FLOOR, "addmm", "addmm")]
    for variant, kind in zip(variants, (kinds[FLOOR], kinds["addmm"], kinds["addmm"]), strict=True):
        check_variant(variant, problem, reference_results(problem, kind.work))
    assert TorchProduct.made - before == 8
    assert variants[0].kernels is variants[1].kernels
    other = make_problem(Shape(8, 16, 24, 2), "cpu", torch.float32)
    assert kinds[FLOOR].factory(other).kernels == {}


def test_the_command(by_torch, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(played, "obstacle", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure.Measurements, "obstacle", lambda self, shape: None)
    assert main(["--as", "sm80", "--quick", "--shapes", "37,29,43,5", "16,8,8,2", "--out", str(tmp_path)]) == 0
    assert (os.environ["FUSED_LORA_AS"], os.environ["TRITON_OVERRIDE_ARCH"]) == ("sm80", "sm80")
    stored = json.loads((tmp_path / "results.json").read_text())
    record = stored["shapes"][0]
    assert list(record["times"]) == [GRAPH]
    outcomes = record["times"][GRAPH][FORWARD_BACKWARD]
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == {
        FLOOR: MEASURED, PACKAGE: MEASURED, "fused_lora_dropout": MEASURED, "fused_lora_triton": UNAVAILABLE,
        "addmm": MEASURED,
    }  # fmt: skip
    assert len(record["kernels"][FLOOR]) == 8
    text = (tmp_path / "table.md").read_text()
    assert "| frozen linear, no adapter, by cuBLAS's fastest sm80 kernels (the floor) | 1 (2 us) | 1 (2 us) |" in text
    assert "| x W^T | fits 166912 | fits 166912 |" in text
    assert "whole call" not in text
    assert str(tmp_path) in capsys.readouterr().out


def test_without_a_hopper_card_it_is_refused(monkeypatch, capsys):
    for available, capability, reason in ((False, None, "there is none"), (True, (8, 6), "it has 8.6")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        with pytest.raises(SystemExit):
            main(["--as", "sm80"])
        assert f"--as sm80 needs a GPU of compute capability 9.0: {reason}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--as", "sm75"])


def test_the_folder_tells_what_was_played(monkeypatch):
    monkeypatch.setattr(backends, "card_name", lambda device: "NVIDIA H200 as sm80")
    assert slug(torch.device("cuda")) == "nvidia-h200-as-sm80"


def test_no_kernels_no_table():
    record = {"shape": vars(ODD), "skipped": None, "kernels": {FLOOR: {}, PACKAGE: {}}}
    assert kernel_table({"shapes": [record]}) == []


@pytest.mark.gpu
@pytest.mark.parametrize("card", ["sm80", "sm86"])
def test_on_hopper(card, tmp_path):
    """In a process of its own, which reads what is played once; Triton's own files tell by what it multiplied."""
    if played.obstacle():
        pytest.skip(played.obstacle())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FUSED_LORA")}
    command = [sys.executable, "-m", "bench", "--as", card, "--quick", "--shapes", "512,256,384,16", "--out", tmp_path]
    done = subprocess.run(
        [*map(str, command)], env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "triton")}, capture_output=True,
        text=True, check=False, cwd=Path(played.__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["environment"]["device"].endswith(f" as {card}")
    (record,) = stored["shapes"]
    for pass_name in (FORWARD, FORWARD_BACKWARD):
        assert set(PASSES) == set(record["times"][GRAPH])
        statuses = {name: outcome["status"] for name, outcome in record["times"][GRAPH][pass_name].items()}
        if not backends.has_extension():
            assert statuses.pop("fused_lora_triton") == UNAVAILABLE
        assert set(statuses.values()) == {MEASURED}, record["times"]
    assert len(record["kernels"][FLOOR]) == 8
    written = [path.read_text() for path in (tmp_path / "triton").rglob("*.ptx")]
    assert any("mma.sync" in text for text in written)
    assert not any("wgmma" in text for text in written)
