"""What goes wrong around tasks: nothing of it goes on in silence."""

import numpy
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fused_lora.tasks import Task, TaskTrainer
from tests.tasks.problem import VOCABULARY, base, config, sequences


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
