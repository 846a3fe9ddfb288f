"""Blocks of layers: every way computes what the reference does, and one that does not has no speed."""

import json

import pytest
import torch

from bench import block_ways
from bench.block_report import entry, markdown
from bench.block_ways import (
    ALONE,
    CPU_BLOCKS,
    GPU_BLOCKS,
    LESS,
    NEIGHBOURS,
    UNFUSED,
    WAYS,
    Block,
    Inputs,
    build,
    expected_results,
    run_block,
)
from bench.blocks import main, measure
from bench.check import relative_error
from bench.document import as_json
from bench.record import summary
from bench.shapes import FORWARD, FORWARD_BACKWARD
from bench.variants import FLOOR, PACKAGE
from fused_lora.modules.siblings import LoRASiblings

# Of torch.compile, which looks at .grad of what it traces.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")
CPU = torch.device("cpu")
CASES = [(block, name) for block in CPU_BLOCKS for name in block.ways()]


@pytest.mark.parametrize(("block", "name"), CASES, ids=lambda value: str(value))
def test_a_way_computes_what_the_reference_does(block, name):
    inputs = Inputs.make(block, CPU, torch.float32)
    expected = expected_results(block, WAYS[name].adapters, inputs)
    results = run_block(build(block, name, CPU, torch.float32), inputs, backward=True)
    assert len(results) == len(expected)
    for (what, exact), result in zip(expected.items(), results, strict=True):
        assert relative_error(result, exact) < 1e-5, what


@pytest.mark.parametrize("r", [8, 128])
def test_adapters_change_outputs_by_about_their_own_size(r):
    block = Block(32, 64, (64, 32), r=r)
    inputs = Inputs.make(block, CPU, torch.float32)
    with_adapters, without = (expected_results(block, adapters, inputs) for adapters in (True, False))
    assert 0.5 < relative_error(with_adapters["y0"], without["y0"]) < 1
    assert set(with_adapters) - set(without) == {"A0", "B0", "A1", "B1"}


def test_what_is_fused():
    group, mlp, alone = CPU_BLOCKS
    assert isinstance(build(group, PACKAGE, CPU, torch.float32), LoRASiblings)
    assert not isinstance(build(group, ALONE, CPU, torch.float32), LoRASiblings)
    assert [build(mlp, name, CPU, torch.float32).save for name in (PACKAGE, LESS)] == ["all", "less"]
    assert type(build(mlp, ALONE, CPU, torch.float32)).__name__ == "MLP"
    assert alone.ways() == [FLOOR, PACKAGE, UNFUSED]


def test_what_is_not_fused_is_not_timed_as_if(monkeypatch):
    monkeypatch.setattr(block_ways, "MLP", lambda config: block_ways.One(config.hidden_size, (32,)))
    with pytest.raises(RuntimeError, match="was not fused"):
        build(Block(32, 64, (85,), gated=True), PACKAGE, CPU, torch.float32)


@pytest.mark.parametrize(("widths", "gated"), [((), False), ((1, 2, 3, 4), False), ((1, 2), True)])
def test_a_block_has_only_so_many_widths(widths, gated):
    with pytest.raises(ValueError, match="widths must be 1 to"):
        Block(1, 2, widths, gated)


def test_a_way_that_is_wrong_has_no_speed(monkeypatch):
    def wrong(layers, block):
        WAYS[UNFUSED].convert(layers, block)
        for layer in layers.children():
            layer.scale *= 0.5

    monkeypatch.setitem(WAYS, PACKAGE, block_ways.Way("wrong", wrong, compiled=False))
    found = measure(CPU_BLOCKS[2], 1, CPU)
    assert found[PACKAGE].keys() == {"reason"}
    assert "wrong result" in found[PACKAGE]["reason"]
    assert found[FLOOR]["seconds"].keys() == {FORWARD, FORWARD_BACKWARD}
    text = markdown(made_up({CPU_BLOCKS[2]: found}))
    assert "* fused_lora, 32 tokens, 85 -> 64: wrong result" in text


@pytest.mark.gpu
def test_a_block_on_a_gpu():
    found = measure(Block(512, 64, (85,), gated=True, r=8), 1, torch.device("cuda"))
    assert all(way["seconds"][FORWARD_BACKWARD]["count"] == 1 for way in found.values()), found
    assert found[LESS]["kept_bytes"] < found[PACKAGE]["kept_bytes"]


def made_up(found):
    about = {"device": "A GPU", "dtype": "bfloat16", "date": "2026-01-01", "rounds": 24, "flush_bytes": 2**28}
    return about | {"versions": {}, "blocks": [entry(block, ways) for block, ways in found.items()]}


def test_the_tables():
    def ways(block, us):
        times = {FLOOR: us, PACKAGE: 1.1 * us, LESS: 1.2 * us, ALONE: 1.54 * us, UNFUSED: 2 * us}
        seconds = {name: summary([us * 1e-6 for us in (times[name], 0.9 * times[name], 5000)]) for name in times}
        return {
            name: {"seconds": dict.fromkeys((FORWARD, FORWARD_BACKWARD), seconds[name]), "kept_bytes": 2**30}
            for name in block.ways()
        }

    found = {block: ways(block, 1000 if "5461" in str(block) else 900) for block in GPU_BLOCKS}
    text = markdown(json.loads(as_json(made_up(found))))
    mlp = "900 (1.00) | 990 (1.10) | 1,080 (1.20) | 1,386 (1.54) | 1,800 (2.00) | 1.40"
    assert text.count(f"| 16384 tokens, MLP 2048 -> 5504 -> 2048 | {mlp} |") == 2
    assert "| 16384 tokens, 5504 -> 2048 | 900 (1.00) | 990 (1.10) | - | - | 1,800 (2.00) | - |" in text
    for odd, even in NEIGHBOURS.items():
        assert f"* {odd}: 90.0% of the speed of {even} (frozen, 90.0%)" in text
    assert text.count("| 1,024 |") > 8


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    samples = tmp_path / "samples.json"
    assert main(["--rounds", "2", "--out", str(tmp_path), "--samples", str(samples)]) == 0
    assert "fused over layer by layer" in capsys.readouterr().out
    stored, with_samples = (
        json.loads(path.read_text())["blocks"][1]["ways"][LESS]["seconds"][FORWARD]
        for path in (tmp_path / "blocks.json", samples)
    )
    assert len(with_samples.pop("samples")) == stored["count"] == 2
    assert with_samples == stored
    assert (tmp_path / "blocks.md").read_text().count("**fused_lora**") == 2
