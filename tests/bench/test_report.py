"""Tables, files and the plot, from a measurement on this machine and from made-up numbers for a GPU."""

import json

import pytest
import torch

from bench import measure, record
from bench.__main__ import QUICK_ROUNDS, main
from bench.measure import MEASURED, UNAVAILABLE, WRONG, Measurements
from bench.record import slug
from bench.report import collect, markdown, write
from bench.shapes import FORWARD, FORWARD_BACKWARD, GPU_SHAPES, PASSES, Shape, flop_floor
from bench.timing import EAGER, GRAPH, HOST
from bench.variants import FLOOR, PACKAGE, VARIANTS

FILES = ["forward_backward.png", "results.json", "table.md"]


def made_up_results() -> dict:
    """What an H100 might give: the peers' measured ratios, one missing library, one wrong result, one skipped shape."""
    ratios = {
        FLOOR: 1, PACKAGE: 1.08, "fused_lora_dropout": 1.14, "fused_lora_dora": 1.15, "fused_lora_triton": 1.18,
        "addmm": 1.35, "merged_weight": 1.45, "compiled": 1.37, "unfused": 1.5, "peft": 1.54, "peft_fp32": 3.93,
        "peft_dora": 2.9, "full_rank": 1.47,
    }  # fmt: skip
    outcomes = {
        name: {"status": MEASURED, "ratio": ratio, "median_us": 700 * ratio, "flops": 5e11, "bytes": 2e8}
        for name, ratio in ratios.items()
    }
    outcomes["compiled"] = {"status": UNAVAILABLE, "reason": "no compiler"}
    outcomes["unfused"] = {"status": WRONG, "reason": "wrong result, no speed reported"}
    both = {
        name: {key: value if key in ("status", "ratio", "reason") else 2 * value for key, value in outcome.items()}
        for name, outcome in outcomes.items()
    }
    records = [
        {
            "shape": vars(shape),
            "name": str(shape),
            "skipped": None,
            "floors": {pass_name: {"flops": flop_floor(shape, pass_name)} for pass_name in PASSES},
            "memory": {name: {"MB": 12.0, "Mr": 2.5} for name in outcomes},
            "times": {mode: {FORWARD: outcomes, FORWARD_BACKWARD: both} for mode in (GRAPH, EAGER, HOST)},
        }
        for shape in GPU_SHAPES[:6]
    ]
    records.append({"shape": vars(GPU_SHAPES[6]), "name": str(GPU_SHAPES[6]), "skipped": "too little memory"})
    environment = {"device": "A GPU", "dtype": "bfloat16", "date": "2026-01-01", "rounds": 24, "flush_bytes": 2**28}
    environment["versions"] = {"torch": "2.11", "peft": None}
    return {
        "environment": environment,
        "variants": {name: kind.label for name, kind in VARIANTS.items()},
        "shapes": records,
    }


def test_markdown_shows_every_mode_and_hides_nothing():
    text = markdown(made_up_results())
    assert text.count("| M, K, N, r | 8192, 4096, 4096, 16 |") == 7
    assert text.index("Forward + backward, kernel time") < text.index("Forward, kernel time") < text.index("whole call")
    assert "| **fused_lora** | 1.08 |" in text
    assert "| unfused, eager | wrong |" in text
    assert "| unfused, torch.compile | - |" in text
    assert f"| {VARIANTS[FLOOR].label} | 1 (700 us) |" in text
    assert "| 8192, 4096, 4096, 16 | backward | 756 | 661 | 1.080 | 0.26 |" in text
    assert "* compiled: no compiler" in text
    assert "* too little memory" in text
    assert "12 (2.5)" in text
    assert "256 MiB zeroed" in text


def test_write_makes_the_three_files(tmp_path):
    folder = tmp_path / "a-gpu"
    write(made_up_results(), folder)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert (folder / "forward_backward.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "results.json").read_text())["environment"]["device"] == "A GPU"


def test_redraw_reads_results_back(tmp_path, capsys):
    write(made_up_results(), tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert main(["--redraw", str(tmp_path / "results.json"), "--out", str(tmp_path / "again")]) == 1
    assert (tmp_path / "again" / "table.md").read_text() == text
    assert "wrong" in capsys.readouterr().out


def test_measured_results_go_to_files(tmp_path):
    variants = {name: VARIANTS[name] for name in (FLOOR, PACKAGE, "addmm")}
    measurements, seen = Measurements("cpu", torch.float32, rounds=2, variants=variants), []
    counts = []
    shapes = (Shape(37, 29, 43, 5), Shape(16, 8, 8, 2))
    results = collect(measurements, shapes, seen.append, lambda partial: counts.append(len(partial["shapes"])))
    assert counts == [1, 2]
    assert seen[:2] == ["37x29x43-r5 forward eager", "37x29x43-r5 forward_backward eager"]
    assert len(seen) == 4
    write(results, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    stored = json.loads((tmp_path / "results.json").read_text())
    times = stored["shapes"][0]["times"][EAGER][FORWARD_BACKWARD]
    assert times[PACKAGE]["count"] == 2
    assert "samples_us" not in times[PACKAGE]
    assert stored["shapes"][0]["fused_lora"] == {"backend": "reference", "kernels": []}
    assert stored["environment"]["versions"]["torch"] == torch.__version__


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "VARIANTS", {name: VARIANTS[name] for name in (FLOOR, PACKAGE)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    samples = tmp_path / "samples.json"
    options = [
        "--quick",
        "--shapes",
        "37,29,43,5",
        "16,8,8,2",
        "--out",
        str(tmp_path / "out"),
        "--samples",
        str(samples),
    ]
    assert main(options) == 0
    told = capsys.readouterr()
    assert "16, 8, 8, 2" in told.out
    assert "2/2" in told.err
    times = json.loads(samples.read_text())["shapes"][1]["times"][EAGER][FORWARD]
    assert len(times[PACKAGE]["samples_us"]) == times[PACKAGE]["count"] == QUICK_ROUNDS
    assert "samples" not in (tmp_path / "out" / "results.json").read_text()


def test_slug_of_a_gpu_is_a_folder_name(monkeypatch):
    assert slug(torch.device("cpu")) == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert slug(torch.device("cuda")) == "nvidia-h100-80gb-hbm3"


def test_main_rejects_a_shape_that_is_none(capsys):
    with pytest.raises(SystemExit):
        main(["--shapes", "1,2,3"])
    assert "M,K,N,r" in capsys.readouterr().err


@pytest.mark.parametrize(("changed", "expected"), [("", "abc"), ("setup.py", "abc-dirty"), (None, None)])
def test_results_name_their_commit(changed, expected, monkeypatch):
    def git(command, *rest):
        if changed is None:
            raise FileNotFoundError("no git")
        return "abc" if command == "rev-parse" else changed

    monkeypatch.setattr(record, "_git", git)
    assert record._commit.__wrapped__() == expected
