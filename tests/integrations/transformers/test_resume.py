"""A run that is resumed from a checkpoint is, bit for bit, the run that was never stopped."""

import shutil

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file
from transformers import TrainerCallback

from fused_lora import replace_linear
from fused_lora.integrations.transformers import ReLoRACallback, checkpoint
from fused_lora.relora import jagged_cosine_schedule

from .runs import OPTIONS, RESET_EVERY, STEPS, WARM_START, assert_equal, model_of, trainer_of

pytestmark = pytest.mark.filterwarnings("default")

# In the warm start, at its end, in a cycle and at a restart.
STOPS = [1, WARM_START, WARM_START + 1, WARM_START + RESET_EVERY]
Q_PROJ = "model.layers.0.self_attn.q_proj"


class Last(TrainerCallback):
    """What a run's optimizer, random numbers and residuals are in the end."""

    def __init__(self, relora):
        self.relora = relora

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        states = optimizer.state_dict()["state"]
        self.tensors = [value for state in states.values() for value in state.values()]
        self.tensors += [*self.relora.relora.lows.values(), torch.get_rng_state()]


def run(folder, resume=None, dtype=torch.float32, given=False, options=(), make=model_of, **trainer):
    """(the trainer, its last tensors) of a run, from a checkpoint if given."""
    callback = ReLoRACallback(**OPTIONS | {"lr_factor": 1.5} | dict(options), restart_warmup_steps=2)
    model = make(dtype)
    optimizers = None, None
    if given:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizers = optimizer, jagged_cosine_schedule(optimizer, STEPS, 1, 2, RESET_EVERY, warm_start_steps=WARM_START)
    trainer = trainer_of(folder, callback, model, optimizers, **{"save_strategy": "steps", "save_steps": 1} | trainer)
    last = Last(callback)
    trainer.add_callback(last)
    torch.manual_seed(2)  # which a resumed run forgets
    trainer.train(resume_from_checkpoint=resume)
    return trainer, last.tensors


def assert_same_runs(got, wanted):
    assert_equal(got[0].model, wanted[0].model)
    assert len(got[1]) == len(wanted[1])
    assert all(torch.equal(a, b) for a, b in zip(got[1], wanted[1], strict=True))


@pytest.mark.parametrize(("dtype", "given"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_bit_for_bit(dtype, given, tmp_path):
    whole = run(tmp_path, dtype=dtype, given=given)
    for step in STOPS:
        place = str(tmp_path / f"checkpoint-{step}")
        again = run(tmp_path, place, dtype, given, save_strategy="no")
        assert_same_runs(again, whole)


@pytest.mark.gpu
def test_bit_for_bit_on_a_gpu(tmp_path):
    whole = run(tmp_path, dtype=torch.bfloat16, use_cpu=False)
    assert whole[0].model.device.type == "cuda"
    for step in STOPS:
        again = run(tmp_path, str(tmp_path / f"checkpoint-{step}"), torch.bfloat16, save_strategy="no", use_cpu=False)
        assert_same_runs(again, whole)


def test_from_the_newest_on_from_a_run_that_was_stopped(tmp_path):
    whole = run(tmp_path / "whole", options={"warm_start_steps": 0, "reset_every": 7})

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 9

    callback = ReLoRACallback(**OPTIONS | {"lr_factor": 1.5, "warm_start_steps": 0, "reset_every": 7})
    callback.restart_warmup_steps = 2
    stopped = trainer_of(tmp_path, callback, save_strategy="steps", save_steps=3)
    stopped.add_callback(Stop())
    torch.manual_seed(2)
    stopped.train()
    assert_same_runs(run(tmp_path, True, options={"warm_start_steps": 0, "reset_every": 7}), whole)


def test_after_skipped_steps(tmp_path, monkeypatch):
    calls, step = [], AcceleratedOptimizer.step

    def scaled(self, closure=None):
        calls.append(self)
        self._is_overflow = len(calls) == 3
        if not self._is_overflow:
            step(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", scaled)
    whole = run(tmp_path, save_steps=7)
    again = run(tmp_path, str(tmp_path / "checkpoint-7"), save_strategy="no")
    assert_same_runs(again, whole)


def test_what_a_checkpoint_holds(tmp_path):
    run(tmp_path, dtype=torch.bfloat16, save_total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"]
    place = tmp_path / f"checkpoint-{STEPS}"
    keys = {key for key in load_file(place / "model.safetensors") if key.startswith(Q_PROJ)}
    assert keys == {f"{Q_PROJ}.{name}" for name in ("weight", "lora_A", "lora_B", "_extra_state")}
    assert not [path for path in place.iterdir() if path.name.startswith(".")]
    saved = torch.load(place / "relora.pt", weights_only=True)
    assert (saved["relora"]["steps"], saved["relora"]["cycle"]) == (STEPS, 3)
    assert saved["relora"]["lows"][Q_PROJ].any()


def test_a_file_that_could_not_be_written_whole_is_not_there(tmp_path, monkeypatch):
    def full(content, file):
        file.write_bytes(b"some")
        raise OSError("no space left")

    model, relora = model_of(), ReLoRACallback(reset_every=3)
    relora.state_dict = dict
    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(tmp_path, model, relora)
    assert not (tmp_path / checkpoint.NAME).exists()


def test_a_checkpoint_that_was_moved(tmp_path):
    """Trainer tells callbacks no path: where it is not output_dir's, the arguments name it; another's is not taken."""
    whole = run(tmp_path / "first", save_steps=5)
    place = tmp_path / "moved"
    shutil.move(tmp_path / "first" / "checkpoint-5", place)
    run(tmp_path / "second", options={"seed": 3, "reset_every": 3}, save_steps=5)
    with pytest.raises(ValueError, match=r"say TrainingArguments\(resume_from_checkpoint=...\) too"):
        run(tmp_path / "second", str(place))
    again = run(tmp_path / "second", str(place), save_strategy="no", resume_from_checkpoint=str(place))
    assert_same_runs(again, whole)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    run(folder, save_steps=5)
    return folder / "checkpoint-5"


@pytest.mark.parametrize(("remove", "options", "error"), [
    ("relora.pt", {}, "a checkpoint with its relora.pt, which ReLoRACallback writes: there is none"),
    ("optimizer.pt", {}, r"checkpoint-5 has no optimizer.pt \(save_only_model\): it cannot be resumed"),
    (None, {"reset_every": 6}, "the checkpoint has reset_every=4, this run 6"),
    (None, {"warm_start_steps": 6}, "the checkpoint has warm_start_steps=2, this run 6"),
    (None, {"reset_every": 7, "warm_start_steps": 0}, "the checkpoint has reset_every=4, this run 7"),
    (None, {"precision": "stochastic"}, "the checkpoint has precision='auto', this run 'stochastic'"),
])  # fmt: skip
def test_what_cannot_be_resumed(remove, options, error, saved, tmp_path):
    place = tmp_path / "checkpoint-5"
    shutil.copytree(saved, place)
    if remove:
        (place / remove).unlink()
    with pytest.raises(ValueError, match=error):
        run(tmp_path, str(place), options=options)


@pytest.mark.parametrize("base", ["fp8", "int8", "nf4", "nf4-nested"])
def test_bit_for_bit_over_codes(base, tmp_path):
    """Of a model whose layers come first: codes are in Trainer's file, residuals in relora.pt, shares in the logs."""
    options = {"warm_start_steps": 0, "reset_every": 7, "precision": "residual"}

    def quantised(dtype):
        model = model_of(dtype)
        replace_linear(model, 3, 5.0, exclude_modules=["lm_head"], base=base)
        return model

    whole = run(tmp_path, options=options, dtype=torch.bfloat16, make=quantised)
    for step in (3, 7, 9):
        place = str(tmp_path / f"checkpoint-{step}")
        assert load_file(f"{place}/model.safetensors")[f"{Q_PROJ}.weight"].element_size() == 1
        lows = torch.load(f"{place}/{checkpoint.NAME}", weights_only=True)["relora"]["lows"]
        assert {low.dtype for low in lows.values()} == {torch.bfloat16}
        again = run(tmp_path, place, torch.bfloat16, options=options, save_strategy="no", make=quantised)
        assert_same_runs(again, whole)
    shares = [line["relora/arrived"] for line in whole[0].state.log_history if "relora/arrived" in line]
    assert shares
    assert all(share == pytest.approx(1, abs=0.1) for share in shares)
    assert whole[0].model.model.layers[0].self_attn.q_proj.weight.dtype is torch.bfloat16
