"""Checkpoints: a run that was killed and resumed is the uninterrupted one, bit for bit, and all tasks' are whole."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_lora
from fused_lora.tasks import Task, TaskTrainer, checkpoints
from fused_lora.tasks.logs import Log, read
from tests.tasks.problem import base, config, factors, tasks
from tests.test_whole_files import found_by_kills

JOINS = {"a": 0, "b": 3, "c": 5}  # before which pass


def start(folder, **options):
    return TaskTrainer(base(), folder, save_every=4, progress=False, **options)


def go_on(trainer, until=20):
    """Tasks join when it is time, and after a resumption again."""
    waiting = trainer.waiting + [name for name, place in trainer._waiting.items() if place is None]
    for name in sorted(waiting):
        trainer.add(tasks()[name])
    while trainer.passes < until:
        for name, passes in JOINS.items():
            if passes == trainer.passes and name not in (*trainer.running, *trainer.ended):
                trainer.add(tasks()[name])
        if not trainer.running:
            break
        trainer.step()
    return trainer


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for part in ("adapters", "logs")
        for path in sorted((folder / part).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    go_on(start(folder)).save()
    return files(folder)


@pytest.mark.parametrize("killed", [2, 4, 6, 9, 12])
def test_killed_and_resumed_is_uninterrupted(killed, uninterrupted, tmp_path):
    """At checkpoints and between them, before and after tasks joined and ended, in the middle of b's steps."""
    torch.manual_seed(0)
    go_on(start(tmp_path), until=killed)
    torch.manual_seed(1)
    trainer = start(tmp_path, resume=True)
    assert trainer.passes == killed // 4 * 4
    go_on(trainer)
    assert trainer.running == []
    assert files(tmp_path) == uninterrupted
    assert sorted(trainer.ended) == ["a", "b", "c"]


def test_a_checkpoint_may_be_in_the_middle_of_a_step(tmp_path):
    go_on(start(tmp_path), until=8)
    state = torch.load(tmp_path / "checkpoints" / "0000002" / "b" / "training.pt", weights_only=True)
    assert state["passes"] == 1
    assert state["grads"] is not None
    assert state["steps"] == 2


def test_a_run_that_is_over_has_nothing_to_do(tmp_path, uninterrupted):
    go_on(start(tmp_path)).save()
    trainer = start(tmp_path, resume=True)
    for task in tasks().values():
        trainer.add(task)
    assert trainer.running == []
    assert trainer.ended == ["a", "b", "c"]
    trainer.run()
    assert files(tmp_path) == uninterrupted
    fresh = go_on(start(tmp_path / "other")).model
    assert all(map(torch.equal, factors(trainer.model, "b"), factors(fresh, "b")))


def test_the_newest_two_are_kept_and_each_tasks_is_an_adapter(tmp_path):
    trainer = go_on(start(tmp_path), until=6)
    for _ in range(4):
        trainer.save()
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == ["0000004", "0000005"]
    model = base()
    fused_lora.load_adapter(model, tmp_path / "checkpoints" / "0000005" / "a", "a")
    assert all(map(torch.equal, factors(model, "a"), factors(trainer.model, "a")))


def test_tasks_of_the_checkpoint_must_be_added_or_removed(tmp_path):
    go_on(start(tmp_path), until=4)
    trainer = start(tmp_path, resume=True)
    trainer.add(tasks()["b"])
    assert trainer.waiting == ["a"]
    with pytest.raises(RuntimeError, match="the checkpoint has a too: add them again, or remove them"):
        trainer.step()
    with pytest.raises(RuntimeError, match="cannot save: tasks wait to be added"):
        trainer.save()
    trainer.remove("a")
    trainer.run()
    assert trainer.ended == ["b"]


@pytest.mark.parametrize(
    "changes", [{"lr": 0.5}, {"steps": 70}, {"config": config(5)}, {"seed": 1}, {"data": [[1, 2]]}]
)
def test_another_task_of_the_name(changes, tmp_path):
    go_on(start(tmp_path), until=4)
    trainer = start(tmp_path, resume=True)
    name = "sequences" if "data" in changes else next(iter(changes))
    with pytest.raises(ValueError, match=f"{name} must be .* as in .*0000001/a, got"):
        trainer.add(Task(**{**vars(tasks()["a"]), **changes}))
    assert trainer.waiting == ["a", "b"]
    assert not [each for each, _ in trainer.model.named_parameters() if "lora_" in each]


def test_a_run_that_is_there_is_not_overwritten(tmp_path):
    go_on(start(tmp_path), until=4)
    with pytest.raises(ValueError, match="folder must have no checkpoints unless they are to be resumed"):
        start(tmp_path)


@pytest.mark.parametrize("name", ["index.json", "a/training.pt", "a/adapter_model.safetensors"])
def test_damaged_ones_are_named(name, tmp_path):
    go_on(start(tmp_path), until=4)
    place = tmp_path / "checkpoints" / "0000001" / name
    place.write_bytes(place.read_bytes()[:20])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        start(tmp_path, resume=True).add(tasks()["a"])


def save(folder, word):
    fill = {name: lambda path: (path / "file").write_text(word) for name in "ab"}
    checkpoints.save(folder, {"word": word}, fill, keep=1)


def word(folder):
    """Of the newest one; others that count as checkpoints are whole too."""
    for place in checkpoints._all(folder):
        found = checkpoints.read_index(place)["word"]
        assert {(place / name / "file").read_text() for name in "ab"} == {found}
    assert place == checkpoints.newest(folder)
    return found


def test_killed_at_any_change(tmp_path, monkeypatch):
    """From one point on it is the new one, before it the old one, and the next save goes through."""

    def check(folder):
        assert word(folder) == "next"
        assert len(list(folder.iterdir())) == 1

    found = found_by_kills(tmp_path, monkeypatch, save, word, check)
    point = found.index("new")
    assert found == ["old"] * point + ["new"] * (len(found) - point)
    assert 5 < point < len(found) - 2


ENDLESS = """
import sys
from tests.tasks.test_resume import go_on, start
trainer = start(sys.argv[1], resume=True)
while True:
    go_on(trainer, until=trainer.passes + 1)
    print(trainer.passes, flush=True)
    if not trainer.running and trainer.passes > 5:
        break
"""


def test_real_kills(tmp_path, uninterrupted):
    """Of a process that trains; until it is through."""
    root = Path(fused_lora.__file__).parent.parent
    command = [sys.executable, "-c", ENDLESS, str(tmp_path)]
    for _ in range(3):
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(6):
                process.stdout.readline()
            os.kill(process.pid, signal.SIGKILL)
    subprocess.run(command, cwd=root, check=True, stdout=subprocess.DEVNULL)
    assert files(tmp_path) == uninterrupted


def test_lines_of_logs(tmp_path):
    trainer = go_on(start(tmp_path), until=6)
    lines = read(tmp_path / "logs" / "a.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert set(lines[0]) == {"step", "loss", "lr", "grad_norm", "tokens", "skipped"}
    (step,) = [step for name, step in trainer.step().items() if name == "a"]
    assert read(tmp_path / "logs" / "a.jsonl")[-1] == step._asdict()


def test_half_a_line_and_no_number(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    log = Log("x", path, 1, 9, progress=False)
    trainer = TaskTrainer(
        base(), progress=False, loss=lambda model, batch: model(batch.input_ids).sum((1, 2)) * torch.nan
    )
    trainer.add(tasks()["a"])
    log.add(trainer.step()["a"])
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 1]
    assert lines[1]["loss"] is None


def test_places_in_the_banks_are_none_of_the_results(tmp_path):
    """A task whose adapter lies elsewhere after a resumption."""
    trainer = start(tmp_path, keep_adapters=False)
    for name in ("a", "c"):
        trainer.add(tasks()[name])
    trainer.step()
    trainer.remove("a")
    trainer.save()
    resumed = start(tmp_path, keep_adapters=False, resume=True)
    resumed.add(tasks()["c"])
    places = [
        {bank.adapters["c"].place for bank in each.model.modules() if hasattr(bank, "adapters")}
        for each in (trainer, resumed)
    ]
    assert places[0].isdisjoint(places[1])
    trainer.step()
    resumed.step()
    assert all(map(torch.equal, factors(resumed.model, "c"), factors(trainer.model, "c")))


def test_dropout_is_the_same_when_resumed(tmp_path):
    """Whatever was drawn meanwhile."""

    def begun(folder, p, **options):
        trainer = start(folder, **options)
        trainer.model.eval()
        for task in tasks(steps=6).values():
            trainer.add(dataclasses.replace(task, config=task.config | {"lora_dropout": p}))
        return trainer

    whole, other = begun(tmp_path / "whole", 0.5), begun(None, 0.0)
    for trainer in (whole, other):
        for _ in range(6):
            trainer.step()
    part = begun(tmp_path / "part", 0.5)
    for _ in range(4):
        part.step()
    torch.rand(7)
    part = begun(tmp_path / "part", 0.5, resume=True)
    assert part.passes == 4
    for _ in range(2):
        part.step()
    assert part.model.training
    for name in ("a", "b", "c"):
        assert all(map(torch.equal, factors(part.model, name), factors(whole.model, name)))
        assert not any(map(torch.equal, factors(other.model, name), factors(whole.model, name)))
