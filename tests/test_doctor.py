import torch

from fused_lora import backends, doctor


def test_prints_versions_backend_and_slow_points(capsys):
    doctor.main()
    printed = capsys.readouterr().out
    for expected in ("torch", torch.__version__, "triton", "C compiler", "extension", "What would be slow here"):
        assert expected in printed


def test_without_a_gpu_it_says_what_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (point,) = doctor.slow_points()
    assert "plain torch" in point


def test_a_missing_compiler_is_named(monkeypatch, capsys):
    monkeypatch.setattr(backends, "host_compiler", lambda: None)
    doctor.main()
    assert "C compiler  none" in capsys.readouterr().out
