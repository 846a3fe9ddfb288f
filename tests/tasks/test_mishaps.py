"""What goes wrong around tasks: nothing of it goes on in silence."""

import json
import shutil

import numpy
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fused_lora.tasks import Task, TaskTrainer
from tests.tasks.problem import VOCABULARY, base, config, factors, sequences


def task(name="a", **options):
    return Task(**(dict(name=name, data=sequences(1, (9, 5, 7)), config=config(4), steps=3, lr=1e-2) | options))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:.*gradient_checkpointing_enable")
def test_checkpoints_with_reentry_are_refused():
    """They cut factors off their losses, whose gradients would be zeros."""
    options = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    model = LlamaForCausalLM(LlamaConfig(**options, num_attention_heads=2, num_key_value_heads=2)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    trainer = TaskTrainer(model, progress=False)
    trainer.add(task(config=config(4, ["q_proj", "v_proj"])))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        trainer.step()


def test_a_task_whose_end_failed_ends_later(tmp_path):
    trainer = TaskTrainer(base(torch.float32), tmp_path, progress=False)
    trainer.add(task(steps=1))
    trainer.add(task("b", steps=2))
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "a").write_text("a file in the way")
    with pytest.raises(OSError, match="adapters/a"):
        trainer.step()
    (tmp_path / "adapters" / "a").unlink()
    assert list(trainer.step()) == ["b"]
    assert trainer.ended == ["a", "b"]


def test_numbers_of_numpy_are_resumed(tmp_path):
    options = dict(lr=numpy.float64(1e-2), config=config(4) | {"lora_alpha": numpy.float64(8)})
    trainer = TaskTrainer(base(torch.float32), tmp_path, progress=False)
    trainer.add(task(**options))
    trainer.step()
    trainer.save()
    resumed = TaskTrainer(base(torch.float32), tmp_path, progress=False, resume=True)
    resumed.add(task(**options))
    assert resumed.running == ["a"]
    resumed.run()


def test_accumulated_gradients_are_a_tasks_own():
    """And not views of what a pass has of all tasks."""
    trainer = TaskTrainer(base(torch.float32), progress=False)
    for i in range(6):
        trainer.add(task(f"t{i}", accumulate=2))
    trainer.step()
    for job in trainer._jobs.values():
        assert all(grad.untyped_storage().nbytes() == grad.numel() * 4 for grad in job._grads)


def test_what_lies_beside_checkpoints_stays(tmp_path):
    trainer = TaskTrainer(base(torch.float32), tmp_path, progress=False)
    trainer.add(task(steps=9))
    trainer.step()
    trainer.save()
    kept = tmp_path / "checkpoints" / "0000001-best"
    kept.mkdir()
    (kept / "index.json").write_text("{}")
    for _ in range(4):
        trainer.step()
        trainer.save()
    assert kept.exists()


def test_a_log_that_cannot_be_written_splits_no_pass(tmp_path):
    """The passes and steps of all tasks are those of one that could be."""
    trainer = TaskTrainer(base(torch.float32), tmp_path, progress=False)
    trainer.add(task())
    trainer.add(task("b"))
    (tmp_path / "logs" / "a.jsonl").unlink()
    (tmp_path / "logs" / "a.jsonl").mkdir()
    with pytest.raises(OSError, match=r"a\.jsonl"):
        trainer.step()
    assert trainer.passes == 1
    assert [job.steps for job in trainer._jobs.values()] == [1, 1]


def test_a_task_whose_log_cannot_be_made_leaves_no_adapter(tmp_path):
    trainer = TaskTrainer(base(torch.float32), tmp_path, progress=False)
    trainer.add(task("b"))
    (tmp_path / "logs" / "a.jsonl").mkdir()
    with pytest.raises(OSError, match=r"a\.jsonl"):
        trainer.add(task())
    assert trainer.running == ["b"]
    (tmp_path / "logs" / "a.jsonl").rmdir()
    trainer.add(task())
    assert trainer.running == ["a", "b"]


def test_a_run_of_nothing(tmp_path):
    trainer = TaskTrainer(base(torch.float32), tmp_path, progress=False)
    with pytest.raises(RuntimeError, match="no task runs: add one"):
        trainer.run()
    assert not (tmp_path / "checkpoints").exists()


def test_a_configs_folder_may_be_gone_later(tmp_path):
    trainer = TaskTrainer(base(torch.float32), tmp_path / "runs", progress=False)
    trainer.add(task(steps=1))
    trainer.run()
    shutil.copytree(tmp_path / "runs" / "adapters" / "a", tmp_path / "given")
    trainer.add(task("b", config=tmp_path / "given"))
    shutil.rmtree(tmp_path / "given")
    trainer.step()
    trainer.save()


@pytest.mark.parametrize("mask", [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
def test_padding_in_the_data_is_none_of_a_task(mask):
    tokens = torch.tensor([3, 4, 5, 6, 7, 8])
    own = torch.tensor(mask).bool()
    padded, labelled = ({"input_ids": tokens, "attention_mask": mask}, {"input_ids": tokens[own]})
    steps = []
    for item in (padded, labelled, labelled | {"labels": tokens[own], "attention_mask": [1] * 4}):
        trainer = TaskTrainer(base(torch.float32), progress=False)
        trainer.add(task(data=[item]))
        steps.append(trainer.step()["a"])
    assert steps[0] == steps[1] == steps[2]
    assert steps[0].tokens == 3


@pytest.mark.parametrize("mask", [[1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1]])
def test_masks_of_something_else(mask):
    trainer = TaskTrainer(base(torch.float32), progress=False)
    with pytest.raises(ValueError, match="a, sequence 0: attention_mask must be as many as input_ids, 1 for at least"):
        trainer.add(task(data=[{"input_ids": [1, 2, 3, 4], "attention_mask": mask}]))


def test_another_base_is_not_resumed(tmp_path):
    trainer = TaskTrainer(base(torch.float32), tmp_path, progress=False)
    trainer.add(task())
    trainer.step()
    trainer.save()
    again = lambda model, **options: TaskTrainer(model, tmp_path, progress=False, resume=True, **options)  # noqa: E731
    other = base(torch.float32)
    with torch.no_grad():
        other.layers[1].mlp.up_proj.weight[0, 5] += 1
    with pytest.raises(ValueError, match=r"model must be that of .*, and layers\.1\.mlp\.up_proj\.weight is another"):
        again(other)
    with pytest.raises(ValueError, match=r"model must be that of .*, and has no layers\."):
        again(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"lora_dtype must be None as in .*, got torch\.float64"):
        again(base(torch.float32), lora_dtype=torch.float64)
    again(base(torch.float32)).add(task())


def test_a_compiled_model_is_resumed_as_it_is(tmp_path):
    trainer = TaskTrainer(torch.compile(base(torch.float32), backend="eager"), tmp_path, progress=False)
    trainer.add(task(steps=1))
    trainer.save()
    TaskTrainer(base(torch.float32), tmp_path, progress=False, resume=True).add(task(steps=1))


def test_an_index_of_another_version(tmp_path):
    trainer = TaskTrainer(base(torch.float32), tmp_path, progress=False)
    trainer.add(task())
    trainer.save()
    path = tmp_path / "checkpoints" / "0000001" / "index.json"
    index = json.loads(path.read_text())
    del index["base"]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json is damaged, or of another version: it has no base"):
        TaskTrainer(base(torch.float32), tmp_path, progress=False, resume=True)


def test_a_step_that_fails_is_taken_again(monkeypatch):
    """As an optimizer that finds no memory."""
    trainers = [TaskTrainer(base(torch.float32), progress=False) for _ in range(2)]
    for trainer in trainers:
        trainer.add(task(accumulate=2))
        trainer.step()
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainers[0].step()
    first, second = (trainer.step()["a"] for trainer in trainers)
    assert first == second
    assert all(map(torch.equal, *(factors(trainer.model, "a") for trainer in trainers)))
