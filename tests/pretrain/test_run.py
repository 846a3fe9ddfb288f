"""Whole runs by the command line: what they leave, how they go on, and what they refuse."""

import csv
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from fused_lora.pretrain import __main__ as cli
from fused_lora.pretrain import checkpoint, logs, run, spectra
from fused_lora.pretrain.logs import HELD_OUT, TRAIN, read
from fused_lora.pretrain.presets import PRESETS

from . import problem

FLAGS = ["--device", "cpu", "--preset", "tiny", "--log-every", "2", "--evaluate-every", "8", "--save-every", "4"]


@pytest.fixture
def folder(parts, tmp_path, monkeypatch):
    """Of tokens; the preset "tiny" is one of seconds."""
    monkeypatch.setitem(PRESETS, "tiny", problem.PRESET)
    monkeypatch.chdir(tmp_path)
    return str(parts.train.values.filename).rsplit("/", 1)[0]


def pretrain(folder, output, *flags):
    return cli.main([*FLAGS, "--data", folder, "--output", str(output), *flags])


def test_a_run_leaves_logs_checkpoints_and_curves(folder, tmp_path, capsys):
    assert pretrain(folder, tmp_path / "out") == 0
    train, held_out = read(tmp_path / "out" / TRAIN), read(tmp_path / "out" / HELD_OUT)
    assert [row["step"] for row in train] == list(range(2, 17, 2))
    assert [row["step"] for row in held_out] == [8, 16]
    assert train[-1]["tokens"] == 16 * 4 * 8
    assert [row["restarts"] for row in train] == [0, 0, 0, 1, 1, 2, 2, 3]
    rates = [row["learning_rate"] for row in train]
    assert rates[2] < rates[3], "a climb after the restart"
    assert f"held-out perplexity {held_out[-1]['perplexity']:.2f}" in capsys.readouterr().out
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "out" / run.CHECKPOINTS)] == [
        "step-0000012", "step-0000016",
    ]  # fmt: skip
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "out" / run.BEGIN)] == ["step-0000004"]
    assert (tmp_path / "out" / run.CURVES).read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "out" / "tensorboard").glob("events*"))


def test_a_run_leaves_torchs_settings_as_they_were(folder, tmp_path, monkeypatch):
    inside = []
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(
        cli, "train", lambda args, ranks: inside.append(torch.is_deterministic_algorithms_warn_only_enabled())
    )
    try:
        assert pretrain(folder, tmp_path / "out") == 0
        assert inside == [False]
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("step", [3, 6, 11])
def test_a_killed_run_goes_on_as_if_nothing_had_been(folder, tmp_path, monkeypatch, step):
    assert pretrain(folder, tmp_path / "whole") == 0
    real = run.Trainer.step

    def dying(trainer):
        if trainer.steps == step:
            raise KilledError
        return real(trainer)

    monkeypatch.setattr(run.Trainer, "step", dying)
    with pytest.raises(KilledError):
        pretrain(folder, tmp_path / "killed")
    monkeypatch.setattr(run.Trainer, "step", real)
    assert pretrain(folder, tmp_path / "killed", "--resume") == 0
    places = [checkpoint.checkpoints(tmp_path / name / run.CHECKPOINTS)[-1] for name in ("whole", "killed")]
    whole, killed = (checkpoint.load(place)[0] for place in places)
    assert problem.same(whole, killed)
    columns = ("step", "loss", "learning_rate", "restarts")
    logged = [[[row[c] for c in columns] for row in read(tmp_path / name / TRAIN)] for name in ("whole", "killed")]
    assert logged[0][-3:] == logged[1][-3:]
    assert [row[0] for row in logged[0]] == [row[0] for row in logged[1]]


def test_what_it_refuses(folder, tmp_path, capsys):
    assert pretrain(folder, tmp_path / "out", "--total-steps", "8") == 0
    (tmp_path / "file").write_text("")
    for flags, words in (
        ((), "holds a run already (step-0000008): --resume it, or choose another --output"),
        (("--micro-batch-size", "0"), "micro_batch_size must be at least 1"),
        (("--save-every", "-10"), "save_every must be at least 1"),
        (("--text", str(tmp_path / "missing.txt")), "No such file"),
        (("--output", str(tmp_path / "file")), str(tmp_path / "file")),
        (("--seq-len", "100000"), "too few for seq_len=100000"),
        (("--resume", "--r", "3"), "was made with"),
        (("--reset-every", "5"), "reset_every must divide the 12 steps"),
        (("--reset-ratio", "1.5"), "reset_ratio must be between 0 and 1, got 1.5"),
    ):
        assert pretrain(folder, tmp_path / "out", *flags) == 1
        assert words in capsys.readouterr().err
    assert cli.main([*FLAGS, "--data", str(tmp_path / "nothing"), "--output", str(tmp_path / "other")]) == 1
    assert "holds no tokens" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_loss_that_is_no_number_ends_the_run(folder, tmp_path, capsys):
    assert pretrain(folder, tmp_path / "out", "--learning-rate", "1e30", "--save-every", "1") == cli.DIVERGED
    assert "error: the loss is nan at step" in capsys.readouterr().err
    for place in checkpoint.checkpoints(tmp_path / "out" / run.CHECKPOINTS):
        assert not any(tensor.isnan().any() for tensor in checkpoint.load(place)[0].values())


def test_a_held_out_loss_beyond_numbers_is_an_infinite_perplexity(tmp_path):
    with logs.Logs(tmp_path, 0, 10, "run") as log:
        log.held_out(5, 10, 1000.0)
    assert read(tmp_path / HELD_OUT)[0]["perplexity"] == float("inf")


def test_ctrl_c_saves_the_step(folder, tmp_path, monkeypatch, capsys):
    real = run.Trainer.step

    def interrupted(trainer):
        loss = real(trainer)
        if trainer.steps == 7:
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(run.Trainer, "step", interrupted)
    assert pretrain(folder, tmp_path / "out") == cli.STOPPED
    assert "stopped at step 7, which is saved" in capsys.readouterr().err
    monkeypatch.setattr(run.Trainer, "step", real)
    assert pretrain(folder, tmp_path / "out", "--resume") == 0
    assert pretrain(folder, tmp_path / "whole") == 0
    whole, stopped = (
        checkpoint.load(checkpoint.checkpoints(tmp_path / name / run.CHECKPOINTS)[-1])[0] for name in ("whole", "out")
    )
    assert problem.same(whole, stopped)


def test_a_finished_run_that_is_resumed_says_its_perplexity(folder, tmp_path, capsys):
    for _ in range(2):
        assert pretrain(folder, tmp_path / "out", "--resume") == 0
    first, second = capsys.readouterr().out.strip().splitlines()
    assert first == second


def test_the_speed_is_of_the_steps_alone(parts, monkeypatch):
    """Ten seconds a step, whatever comes between, and however often it is read."""
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(run.time, "perf_counter", lambda: float(next(clock)))
    trainer = problem.trainer(parts)
    meter = run._Meter(trainer)
    for _ in range(3):
        meter.add(torch.tensor(1.0))
        meter.skip()  # each reading of this clock is ten seconds later
        meter.add(torch.tensor(2.0))
        loss, speed = meter.read()
        assert loss == 1.5
        assert speed == 2 * trainer.options.tokens_per_step / 10


def test_what_an_abandoned_run_began_is_not_the_next_ones(folder, tmp_path):
    assert pretrain(folder, tmp_path / "out") == 0
    shutil.rmtree(tmp_path / "out" / run.CHECKPOINTS)
    assert pretrain(folder, tmp_path / "out", "--warm-start-steps", "8") == 0
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "out" / run.BEGIN)] == ["step-0000008"]


def test_without_a_text_it_reads_pythons_documentation(folder, tmp_path, monkeypatch):
    def write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(f"to be or not to be {i}" for i in range(400)))
        return path

    monkeypatch.setattr(cli, "write_documentation", write)
    assert cli.main([*FLAGS, "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "pretrain_output" / "tokens-python.txt-300" / "train.bin").exists()


def test_half_a_line_is_no_line(tmp_path):
    path = tmp_path / TRAIN
    path.write_text(",".join(logs.COLUMNS[TRAIN]) + "\n10,20,1.5,3.0,0.1,0\n20,40,1.")
    assert [row["step"] for row in read(path)] == [10]


def test_spectra_count_the_cycles(folder, tmp_path, capsys):
    """r = 2: LoRA's change has rank 2, ReLoRA's three cycles 6; of 16."""
    for method in ("lora", "relora", "full"):
        assert pretrain(folder, tmp_path / method, "--method", method) == 0
    runs = [str(tmp_path / method) for method in ("lora", "relora", "full")]
    assert spectra.main([*runs, "--output", str(tmp_path / "spectra")]) == 0
    with open(tmp_path / "spectra" / "ranks.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ranks = {
        method: {int(row["numerical_rank"]) for row in rows if row["run"] == method} for method in ("lora", "relora")
    }
    assert ranks == {"lora": {2}, "relora": {6}}
    assert all(int(row["numerical_rank"]) > 12 for row in rows if row["run"] == "full")
    assert (tmp_path / "spectra" / "spectra.png").read_bytes().startswith(b"\x89PNG")
    assert spectra.main([str(tmp_path)]) == 1
    assert "has no checkpoint" in capsys.readouterr().err


def test_spectra_of_bfloat16_use_the_low_halves(folder, tmp_path):
    assert pretrain(folder, tmp_path / "out", "--dtype", "bfloat16") == 0
    begin, end = (checkpoint.checkpoints(tmp_path / "out" / name)[-1] for name in (run.BEGIN, run.CHECKPOINTS))
    for spectrum in spectra.spectra(begin, end).values():
        assert spectrum.values[6] < 1e-4 * spectrum.values[0]


def test_two_ranks_train_as_one(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"to be or not to be {i}" for i in range(2000)))
    flags = shlex.split(
        "--device cpu --preset tiny --seq-len 8 --batch-size 4 --micro-batch-size 1 --total-steps 8 "
        "--warm-start-steps 4 --reset-every 2 --warmup-steps 2 --restart-warmup-steps 1 --lora-dropout 0 --log-every 2"
    )
    common = ["-m", "fused_lora.pretrain", *flags, "--text", "text.txt", "--data", "tokens", "--output"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launcher, output in (([], "one"), (torchrun, "two")):
        subprocess.run([sys.executable, *launcher, *common, output], check=True, capture_output=True, cwd=tmp_path)
    one, two = ([row["loss"] for row in read(tmp_path / name / TRAIN)] for name in ("one", "two"))
    assert len(one) == len(two) == 4
    assert all(abs(a - b) < 1e-3 for a, b in zip(one, two, strict=True))
