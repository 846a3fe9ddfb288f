"""A run's steps: which parameters train when, micro-batches, and that nothing is lost over a checkpoint."""

import random
from dataclasses import replace

import pytest
import torch

from fused_lora import LoRALinear
from fused_lora.pretrain import checkpoint, data
from fused_lora.pretrain.repeatable import repeatable
from tests.ops.problem import DEVICES

from .problem import LLAMA, PRESET, options, same, trainer, weights


def steps(run, count):
    return [run.step().item() for _ in range(count)]


@pytest.mark.parametrize("method", ["full", "control", "lora", "relora"])
def test_methods(parts, method):
    run = trainer(parts, method=method)
    losses = steps(run, PRESET.total_steps)
    assert losses[-1] < losses[0]
    wrapped = [name for name, module in run.model.named_modules() if isinstance(module, LoRALinear)]
    assert len(wrapped) == (14 if method in ("lora", "relora") else 0)
    assert not any("lm_head" in name or "embed" in name for name in wrapped)
    assert run.restarts == (3 if method == "relora" else 0)
    assert run.model.config.hidden_size == (8 if method == "control" else 16)


@pytest.mark.parametrize("base", ["zero", "absent"])
def test_bases_without_a_warm_start(parts, base):
    run = trainer(parts, method="lora" if base == "absent" else "relora", base=base, warm_start_steps=0)
    weight = run.model.layers[0].mlp.up_proj.weight
    assert not weight.any()
    steps(run, 4)
    assert weight.any() == (base == "zero"), "merged at the first restart"


def test_micro_batches_are_the_batch(parts):
    whole, cut = (trainer(parts, micro_batch_size=size, lora_dropout=0.0) for size in (None, 3))
    for ours, theirs in zip(steps(cut, 8), steps(whole, 8), strict=True):
        assert abs(ours - theirs) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at", [2, 4, 6, 8])
def test_resumed_runs_are_the_same_bit_for_bit(parts, tmp_path, at, dtype, device):
    """Killed in the warm start, at its end, within a cycle and at a restart."""
    whole = trainer(parts, device, dtype=dtype)
    steps(whole, at)
    whole.save(tmp_path)
    losses = steps(whole, 10 - at)
    resumed = trainer(parts, device, dtype=dtype)
    resumed.load(checkpoint.checkpoints(tmp_path)[-1])
    assert resumed.steps == at
    assert steps(resumed, 10 - at) == losses
    assert same(weights(resumed), weights(whole))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of the compiler, on its way through the model
def test_long_sums_on_a_gpu_are_the_same_bit_for_bit(tmp_path):
    """Where many threads add to one entry: attention's and the embedding's backward, compiled."""
    rng = random.Random(0)
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join(rng.choices("abcdefgh", k=800)) for _ in range(400)))
    parts = data.prepare(tmp_path / "text.txt", tmp_path / "tokens", LLAMA.vocab_size)
    wide = replace(LLAMA, hidden_size=256, intermediate_size=512, num_attention_heads=4)
    changes = {"model": wide, "seq_len": 256, "batch_size": 64, "r": 16, "dtype": torch.bfloat16}
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        with repeatable():
            run = trainer(parts, "cuda", compiled=True, **changes)
            found.append((steps(run, 10), weights(run)))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


@pytest.mark.parametrize(("changes", "words"), [
    ({"r": 4}, "was made with r=2, this run has 4"),
    ({"method": "full"}, "was made with method=relora, this run has full"),
    ({"seed": 5}, "was made with seed=0, this run has 5"),
    ({"text": "other"}, "was made with text=.* tokens of vocabulary .*, this run has other"),
])  # fmt: skip
def test_a_checkpoint_of_another_run_changes_nothing(parts, tmp_path, monkeypatch, changes, words):
    changes = dict(changes)
    run = trainer(parts)
    steps(run, 6)
    run.save(tmp_path)
    text = changes.pop("text", None)
    other = trainer(parts, **changes)
    if text:
        monkeypatch.setattr(type(parts), "fingerprint", text)
    before = weights(other)
    with pytest.raises(ValueError, match=words):
        other.load(checkpoint.checkpoints(tmp_path)[-1])
    assert same(weights(other), before)
    assert other.steps == 0


def test_a_checkpoint_that_is_cut_short_changes_nothing(parts, tmp_path):
    run = trainer(parts)
    steps(run, 5)
    run.save(tmp_path)
    place = checkpoint.checkpoints(tmp_path)[-1]
    (place / checkpoint.MODEL).write_bytes((place / checkpoint.MODEL).read_bytes()[:-10])
    other = trainer(parts)
    before = weights(other)
    with pytest.raises(ValueError, match="is cut short"):
        other.load(place)
    assert same(weights(other), before)


KEPT = 4  # steps since the warm start


@pytest.mark.parametrize(
    ("chosen", "step"),
    [
        ({}, KEPT),
        ({"published": True}, KEPT),
        ({"published": True, "jagged": False}, KEPT),
        ({"reset": False, "jagged": False}, KEPT),
        ({"reset_step": True}, 0),
        ({"jagged": False}, 0),
        ({"jagged": False, "reset_step": False}, KEPT),
    ],
    ids=str,
)
def test_adams_step_after_a_restart(parts, chosen, step):
    run = trainer(parts, **chosen)
    steps(run, 8)
    factor = run.model.layers[0].mlp.up_proj.lora_A
    assert run.optimizer.state[factor]["step"].item() == step


def test_published_climbs_begin_at_zero(parts):
    for published in (True, False):
        run = trainer(parts, published=published)
        steps(run, 8)
        assert (run.scheduler.get_last_lr()[0] == 0) == published


@pytest.mark.parametrize("keeps", [{"published": True}, {"reset": False}], ids=str)
def test_a_step_that_would_be_kept_and_reset(keeps):
    with pytest.raises(ValueError, match="reset_step=True is not for"):
        options(reset_step=True, **keeps)


def test_without_reset_the_moments_survive_a_restart(parts):
    for reset in (True, False):
        run = trainer(parts, reset=reset)
        steps(run, 8)
        moment = run.optimizer.state[run.model.layers[0].mlp.up_proj.lora_A]["exp_avg"]
        assert (moment != 0).float().mean() < 0.1 if reset else (moment != 0).float().mean() > 0.9


def test_held_out_loss_is_the_mean_over_all_windows(parts):
    run = trainer(parts)
    windows = [parts.held_out.window(i, PRESET.seq_len) for i in range(parts.held_out.windows(PRESET.seq_len))]
    batch = torch.stack(windows)
    exact = torch.nn.functional.cross_entropy(run.model(batch[:, :-1]).flatten(0, 1).double(), batch[:, 1:].flatten())
    assert abs(run.held_out_loss(parts.held_out) - exact.item()) < 1e-5
    assert run.model.training


def test_dropout_does_not_depend_on_what_was_drawn_before(parts):
    first, second = trainer(parts, lora_dropout=0.5), trainer(parts, lora_dropout=0.5)
    for _ in range(6):
        torch.rand(3)
        assert first.step().item() == second.step().item()


@pytest.mark.parametrize(("changes", "words"), [
    ({"method": "galore"}, "method must be one of full, control, lora, relora, got 'galore'"),
    ({"reset_every": 5}, "reset_every must divide the 12 steps after the warm start"),
    ({"warm_start_steps": 16}, "warm_start_steps must be below total_steps=16"),
    ({"learning_rate": 0.0}, "learning_rate must be positive"),
    ({"relora_learning_rate": -1e-3}, "relora_learning_rate must be positive"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"seq_len": -3}, "seq_len must be at least 1"),
    ({"method": "full", "total_steps": 1}, "warmup_steps must end by the last step, step 1, got 2"),
])  # fmt: skip
def test_wrong_options(changes, words):
    with pytest.raises(ValueError, match=words):
        options(**changes)
