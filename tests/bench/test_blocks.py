"""Blocks of layers: every way computes what the formula does, and one that does not has no speed."""

import json

import pytest
import torch

from bench import block_ways
from bench.block_report import markdown
from bench.block_ways import (
    ALONE,
    CPU_BLOCKS,
    GPU_BLOCKS,
    LESS,
    NEIGHBOURS,
    UNFUSED,
    WAYS,
    Problem,
    build,
    reference,
    run,
)
from bench.blocks import main, measure
from bench.check import WrongResultError, relative_error
from bench.shapes import FORWARD, FORWARD_BACKWARD
from bench.variants import FLOOR, PACKAGE

CPU = torch.device("cpu")
CASES = [(block, name) for block in CPU_BLOCKS for name in block.ways()]
ABOUT = {
    "device": "A GPU",
    "dtype": "bfloat16",
    "date": "2026-01-01",
    "rounds": 24,
    "flush_bytes": 2**28,
    "versions": {},
}


@pytest.mark.parametrize(("block", "name"), CASES, ids=lambda value: str(value))
def test_a_way_computes_the_formula(block, name):
    problem = Problem.make(block, CPU, torch.float32)
    expected = reference(block, WAYS[name].adapters, problem)
    results = run(build(block, name, CPU, torch.float32), problem, backward=True)
    assert len(results) == len(expected)
    for (what, exact), result in zip(expected.items(), results, strict=True):
        assert relative_error(result, exact) < 1e-5, what


def test_adapters_are_as_large_as_what_they_are_beside():
    problem = Problem.make(CPU_BLOCKS[0], CPU, torch.float32)
    with_adapters, without = (reference(CPU_BLOCKS[0], adapters, problem) for adapters in (True, False))
    assert relative_error(with_adapters["y0"], without["y0"]) > 0.1
    assert set(with_adapters) - set(without) == {"A0", "B0", "A1", "B1"}


def test_what_is_fused():
    group, mlp, alone = CPU_BLOCKS
    assert build(group, PACKAGE, CPU, torch.float32).q_proj.group is not None
    assert build(group, ALONE, CPU, torch.float32).q_proj.group is None
    saves = [build(mlp, name, CPU, torch.float32).save for name in (PACKAGE, LESS)]
    assert saves == ["all", "less"]
    assert type(build(mlp, ALONE, CPU, torch.float32)).__name__ == "MLP"
    assert alone.ways() == [FLOOR, PACKAGE, UNFUSED]


# Of torch.compile, which looks at .grad of what it traces.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")
def test_a_way_that_is_wrong_has_no_speed(monkeypatch):
    def wrong(block, r):
        WAYS[UNFUSED].convert(block, 2 * r)  # and so half the scale

    monkeypatch.setitem(block_ways.WAYS, PACKAGE, block_ways.Way("wrong", wrong, compiled=False))
    with pytest.raises(WrongResultError, match="y0"):
        measure(CPU_BLOCKS[2], 1, CPU)


def test_the_tables():
    def ways(block, us):
        times = {FLOOR: us, PACKAGE: 1.1 * us, LESS: 1.2 * us, ALONE: 1.54 * us, UNFUSED: 2 * us}
        return {
            name: {"seconds": {p: [times[name] * 1e-6] * 3 for p in (FORWARD, FORWARD_BACKWARD)}, "kept_bytes": 2**30}
            for name in block.ways()
        }

    results = {block: ways(block, 1000 if "5461" in str(block) else 900) for block in GPU_BLOCKS}
    text = markdown(results, ABOUT)
    mlp = "900 (1.00) | 990 (1.10) | 1,080 (1.20) | 1,386 (1.54) | 1,800 (2.00) | 1.40"
    assert text.count(f"| 16384 tokens, MLP 2048 -> 5504 -> 2048 | {mlp} |") == 2
    assert "| 16384 tokens, 5504 -> 2048 | 900 (1.00) | 990 (1.10) | - | - | 1,800 (2.00) | - |" in text
    odd, even = NEIGHBOURS[0]
    assert f"* {odd}: 90.0% of the speed of {even}" in text
    assert text.count("| 1,024 |") > 8


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")
def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--rounds", "2", "--out", str(tmp_path)]) == 0
    assert "fused over layer by layer" in capsys.readouterr().out
    stored = json.loads((tmp_path / "blocks.json").read_text())
    assert len(stored["blocks"][str(CPU_BLOCKS[1])][LESS]["seconds"][FORWARD]) == 2
    assert (tmp_path / "blocks.md").read_text().count("**fused_lora**") == 2
