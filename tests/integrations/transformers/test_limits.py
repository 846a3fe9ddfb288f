"""What a Trainer may not do beside ReLoRA: one clear error, with nothing changed."""

import pytest
import torch
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import nn

from fused_lora import LoRALinear
from fused_lora.integrations.transformers import ReLoRACallback

from .runs import OPTIONS, RESET_EVERY, InOrder, arguments, dataset, model_of, trainer_of

pytestmark = pytest.mark.filterwarnings("default")


def is_plain(model):
    return not any(isinstance(module, LoRALinear) for module in model.modules())


@pytest.mark.parametrize(("options", "error"), [
    ({"reset_every": 0}, "reset_every"),
    ({"reset_every": 4, "precision": "half"}, "precision must be one of auto, residual, stochastic, nearest"),
    ({"reset_every": 4, "rank": 8}, "unexpected keyword argument 'rank'"),
    ({"reset_every": 4, "scheduler": None}, "scheduler is Trainer's to give"),
])  # fmt: skip
def test_options(options, error):
    with pytest.raises((ValueError, TypeError), match=error):
        ReLoRACallback(**options)


def made(tmp_path, model, **options):
    return trainer_of(tmp_path, ReLoRACallback(**OPTIONS | {"warm_start_steps": 0}), model, **options)


@pytest.mark.parametrize(("options", "error"), [
    ({"load_best_model_at_end": True, "save_strategy": "epoch", "eval_strategy": "epoch"}, "load_best_model_at_end"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size"),
])  # fmt: skip
def test_arguments(options, error, tmp_path):
    model = model_of()
    args = arguments(tmp_path, **options)
    with pytest.raises(ValueError, match=f"{error} must be False"):
        InOrder(model, args, train_dataset=dataset(), eval_dataset=dataset(), callbacks=[ReLoRACallback(reset_every=4)])
    assert is_plain(model)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharding(kind, tmp_path, monkeypatch):
    model = model_of()
    callback = ReLoRACallback(reset_every=4)
    args = arguments(tmp_path)
    trainer_of(tmp_path, ReLoRACallback(reset_every=4))
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType[kind])
    with pytest.raises(ValueError, match=f"must run on one device or by DDP, not by {kind}"):
        callback.on_init_end(args, None, None, model=model)
    assert is_plain(model)


def test_names_from_any_iterable(tmp_path):
    """They are read several times."""
    callback = ReLoRACallback(reset_every=4, target_modules=(name for name in ["q_proj", "up_proj"]))
    trainer_of(tmp_path, callback, max_steps=1).train()
    assert [name.rpartition(".")[2] for name in callback.report.replaced] == ["q_proj", "up_proj"] * 2


def test_frozen_weights(tmp_path):
    model = model_of()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"up_proj\.weight is frozen, and ReLoRA would train it"):
        made(tmp_path, model)
    assert is_plain(model)


def test_an_optimizer_of_other_parameters(tmp_path):
    model = model_of()
    optimizer = torch.optim.AdamW(model.lm_head.parameters())
    with pytest.raises(ValueError, match="optimizer must hold every parameter that is trained"):
        trainer_of(tmp_path, ReLoRACallback(reset_every=4), model, (optimizer, None))
    assert is_plain(model)


def test_an_optimizer_that_cannot_be_reset(tmp_path):
    with pytest.raises(ValueError, match=r"optimizer must be one that restarts can reset.*Adagrad"):
        made(tmp_path, model_of(), optim="adagrad").train()


def test_a_schedule_of_other_restarts(tmp_path):
    callback = ReLoRACallback(**OPTIONS, restart_warmup_steps=1)
    with pytest.raises(ValueError, match="reset_every must divide the 15 steps after the warm start"):
        trainer_of(tmp_path, callback, max_steps=17).train()


def test_a_callback_that_came_late(tmp_path):
    trainer = InOrder(model_of(), arguments(tmp_path), train_dataset=dataset())
    trainer.add_callback(ReLoRACallback(reset_every=4))
    with pytest.raises(ValueError, match="no add_callback, no model_init"):
        trainer.train()


def test_a_model_that_train_makes(tmp_path):
    args, callbacks = arguments(tmp_path), [ReLoRACallback(reset_every=4)]
    trainer = InOrder(model_init=lambda: model_of(), args=args, train_dataset=dataset(), callbacks=callbacks)
    with pytest.raises(ValueError, match="no add_callback, no model_init"):
        trainer.train()


def test_a_second_run(tmp_path):
    trainer = made(tmp_path, model_of(), max_steps=RESET_EVERY)
    trainer.train()
    with pytest.raises(RuntimeError, match="a ReLoRACallback is of one run"):
        trainer.train()


def test_finish_before_the_run():
    with pytest.raises(RuntimeError, match="there is no run to finish: call train"):
        ReLoRACallback(reset_every=4).finish()


class Several:
    """Arguments on one of several processes, as far as the callback asks."""

    world_size = 2


@pytest.mark.parametrize("prepared", [False, True])
def test_several_processes(prepared, tmp_path):
    callback = ReLoRACallback(**OPTIONS | {"warm_start_steps": 0 if prepared else 3})
    trainer = trainer_of(tmp_path, callback)
    optimizer = trainer.create_optimizer()
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    if prepared:
        scheduler = AcceleratedScheduler(scheduler, optimizer)
    error = "lr_scheduler must not be prepared by Accelerate" if prepared else "warm_start_steps must be 0 under DDP"
    with pytest.raises(ValueError, match=error):
        callback.on_train_begin(Several, trainer.state, None, trainer.model, optimizer, scheduler)
    assert prepared or all(type(layer.self_attn.q_proj) is nn.Linear for layer in trainer.model.model.layers)
