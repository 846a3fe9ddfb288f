"""A Trainer's run is the run of a loop with the controller in it, and ends in a plain model."""

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import LlamaForCausalLM, get_scheduler

from fused_lora import LoRALinear, replace_linear
from fused_lora.integrations.transformers import ReLoRACallback
from fused_lora.relora import ReLoRA, jagged_cosine_schedule

from .runs import (
    ACCUMULATION,
    BATCH,
    CONFIG,
    OPTIONS,
    RESET_EVERY,
    STEPS,
    WARM_START,
    assert_equal,
    dataset,
    model_of,
    trainer_of,
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("default")

CLIMB = 2
# What random numbers decide is another matter: the two loops draw them at other times.
STILL = type(CONFIG)(**CONFIG.to_dict() | {"attention_dropout": 0.0})


def schedule_of(optimizer, warm_start, climb, steps=STEPS):
    if climb:
        return jagged_cosine_schedule(optimizer, steps, 1, climb, RESET_EVERY, warm_start_steps=warm_start)
    return get_scheduler("linear", optimizer, num_warmup_steps=1, num_training_steps=steps)


def by_hand(warm_start, climb, steps=STEPS, model=None, **options):
    """The same run without a Trainer: the plain model it ends in, and the learning rate of each step."""
    model = model_of(config=STILL) if model is None else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    scheduler = schedule_of(optimizer, warm_start, climb, steps)
    relora = ReLoRA(model, optimizer, scheduler, **OPTIONS | {"warm_start_steps": warm_start} | options)
    batches = torch.stack([each["input_ids"] for each in dataset()]).view(-1, ACCUMULATION, BATCH, 8)
    rates = []
    for batch in batches[:steps]:
        for tokens in batch:
            (model(input_ids=tokens, labels=tokens).loss / ACCUMULATION).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        relora.step()
    return relora.finish(), rates


def in_trainer(folder, warm_start, climb, model=None, optimizers=(None, None), trainer=(), **options):
    options = OPTIONS | {"warm_start_steps": warm_start} | options
    callback = ReLoRACallback(**options, restart_warmup_steps=climb)
    model = model_of(config=STILL) if model is None else model
    run = trainer_of(folder, callback, model, optimizers, **{"logging_steps": 1} | dict(trainer))
    run.train()
    return run, callback


def rates_of(trainer):
    return [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]


@pytest.mark.parametrize("climb", [None, CLIMB], ids=["linear", "jagged"])
@pytest.mark.parametrize("warm_start", [0, WARM_START])
def test_it_is_the_loop_by_hand(warm_start, climb, tmp_path):
    steps = warm_start + 3 * RESET_EVERY
    trainer, callback = in_trainer(tmp_path, warm_start, climb, trainer={"max_steps": steps})
    wanted, rates = by_hand(warm_start, climb, steps)
    assert_equal(trainer.model, wanted)
    assert rates_of(trainer) == rates
    assert callback.relora.steps == steps
    assert callback.report.replaced[0] == "model.layers.0.self_attn.q_proj"


def test_it_ends_a_cycle_that_the_last_step_cuts_short(tmp_path):
    trainer, _ = in_trainer(tmp_path, WARM_START, None, trainer={"max_steps": 9})
    assert_equal(trainer.model, by_hand(WARM_START, None, 9)[0])


@pytest.mark.parametrize("warm_start", [0, WARM_START])
def test_an_optimizer_and_a_schedule_that_are_given(warm_start, tmp_path):
    model = model_of(config=STILL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    steps = warm_start + 3 * RESET_EVERY
    optimizers = optimizer, schedule_of(optimizer, warm_start, CLIMB, steps)
    trainer, _ = in_trainer(tmp_path, warm_start, None, model, optimizers, {"max_steps": steps})
    assert_equal(trainer.model, by_hand(warm_start, CLIMB, steps)[0])


@pytest.mark.parametrize("options", [
    {"gradient_checkpointing": True},
    {"torch_compile": True, "torch_compile_backend": "eager"},
], ids=["checkpointing", "compiled"])  # fmt: skip
@pytest.mark.parametrize("warm_start", [0, WARM_START])
def test_with_what_else_a_trainer_does(warm_start, options, tmp_path):
    trainer, _ = in_trainer(tmp_path, warm_start, None, trainer={"max_steps": 8, **options})
    wanted = by_hand(warm_start, None, 8)[0].state_dict()
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-5)  # compiled code may round elsewhere


def test_lora_linears_of_the_users(tmp_path):
    """They train as they are."""
    models = [model_of(config=STILL) for _ in range(2)]
    for model in models:
        replace_linear(model, r=5, lora_alpha=7, target_modules=["down_proj", "v_proj"])
    trainer, callback = in_trainer(tmp_path, 0, None, models[0], r=64, trainer={"max_steps": 8})
    assert callback.report is None
    assert_equal(trainer.model, by_hand(0, None, 8, models[1])[0])


def test_a_plain_model_at_the_end(tmp_path):
    trainer, callback = in_trainer(tmp_path, 0, None, trainer={"max_steps": 5})
    assert not any(isinstance(module, LoRALinear) for module in trainer.model.modules())
    assert callback.finish() is trainer.model
    trainer.save_model()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert_equal(loaded, trainer.model)


def test_log_lines(tmp_path):
    """One at each restart, whenever else Trainer logs."""
    trainer, _ = in_trainer(tmp_path, WARM_START, None, trainer={"logging_strategy": "no"})
    lines = [(line["step"], line["relora/cycle"]) for line in trainer.state.log_history if "loss" in line]
    assert lines == [(6, 1), (10, 2), (14, 3)]


def test_steps_that_loss_scaling_skips(tmp_path, monkeypatch):
    """They move neither the restarts nor the schedule: the run is the one without them, and ends short of the end."""
    skipped, calls, step = (3, 7), [], AcceleratedOptimizer.step

    def scaled(self, closure=None):
        calls.append(self)
        self._is_overflow = len(calls) in skipped
        if not self._is_overflow:
            step(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", scaled)
    trainer, callback = in_trainer(tmp_path, WARM_START, CLIMB)
    assert (trainer.state.global_step, callback.relora.steps) == (STEPS, STEPS - len(skipped))
    rates = by_hand(WARM_START, CLIMB)[1]
    for step in skipped:
        rates.insert(step - 1, rates[step - 1])
    assert rates_of(trainer) == rates[:STEPS]
    cycles = {line["step"]: line["relora/cycle"] for line in trainer.state.log_history}
    assert [cycles[step] for step in (7, 8, 11, 12)] == [0, 1, 1, 2]


def test_the_schedule_is_for_a_lambda_lr(tmp_path):
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(TypeError, match="scheduler must be a LambdaLR to become a jagged one, got ConstantLR"):
        in_trainer(tmp_path, WARM_START, CLIMB, model, (optimizer, scheduler))
