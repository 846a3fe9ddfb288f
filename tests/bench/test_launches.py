"""Single launches."""

import json

import pytest
import torch

from bench import launches, played
from bench.launches import main
from bench.predictions import read_launches
from bench.record import RESULTS
from bench.shapes import GPU_SHAPES, OTHER_SHAPES, Shape


def test_without_a_gpu_it_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main([])
    assert "a GPU is needed" in capsys.readouterr().err


def test_the_file_is_what_predictions_read(monkeypatch, tmp_path):
    us = {"cublas f": 100, "cublas dx": 110, "cublas fb": 200, "csrc f": 105, "csrc b": 140, "csrc fb": 240}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launches, "environment", lambda *arguments: {"device": "A GPU"})
    monkeypatch.setattr(launches, "time_launches", lambda shape, kinds, device: us)
    assert main(["--shapes", "8192,4096,4096,128", "512,4096,4096,16", "--out", str(tmp_path)]) == 0
    first, second = read_launches(tmp_path / "launches.json")
    assert (str(first.shape), str(second.shape)) == ("8192x4096x4096-r128", "512x4096x4096-r16")
    assert first.ratios["csrc"].tolist() == pytest.approx([1.05, 1.2])


@pytest.mark.parametrize("name", ["nvidia-h200", "nvidia-h200-as-sm80"])
def test_what_was_measured_has_every_launch(name):
    found = json.loads((RESULTS / name / "launches.json").read_text())["shapes"]
    assert {str(Shape.parse(key)) for key in found} == {str(shape) for shape in (*GPU_SHAPES, *OTHER_SHAPES)}
    assert all(len(us) == 6 and min(us.values()) > 0 for us in found.values())


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    if played.obstacle():
        pytest.skip(played.obstacle())
    assert main(["--shapes", "512,256,384,16", "--out", str(tmp_path)]) == 0
    (measured,) = read_launches(tmp_path / "launches.json")
    assert (measured.times["csrc"] > 1).all()
