"""The controller: when it wraps and restarts, what it keeps, what it forgets, and that a killed run loses nothing."""

import copy
import io
from functools import partial
from types import SimpleNamespace

import accelerate
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import ChainedScheduler

from fused_lora import LoRALinear, replace_linear
from fused_lora.reference import join
from fused_lora.relora import ReLoRA, controller, jagged_cosine_schedule
from fused_lora.relora.optimizer_reset import MOMENTS
from fused_lora.relora.seeds import mix
from tests.ops.problem import DEVICES

OPTIONS = {"reset_every": 6, "warm_start_steps": 4, "r": 3, "lora_alpha": 5.0, "exclude_modules": ["head"]}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(12, 20)
        self.mlp = nn.Linear(20, 12, bias=False)
        self.head = nn.Linear(12, 7)

    def forward(self, x):
        return self.head(x + self.mlp(torch.tanh(self.attn(x))))


class Run:
    """A training of a small net on random numbers that depend on the step alone."""

    def __init__(self, device="cpu", dtype=torch.float32, total=28, schedule=True, **options):
        torch.manual_seed(1)
        self.net = Net().to(device, dtype)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.01)
        options = OPTIONS | options
        self.scheduler = None
        if schedule:
            self.scheduler = jagged_cosine_schedule(
                self.optimizer, total, 2, 2, options["reset_every"], warm_start_steps=options["warm_start_steps"]
            )
        self.relora = ReLoRA(self.net, self.optimizer, self.scheduler, **options)
        self.device, self.dtype = device, dtype

    def batch(self, step):
        generator = torch.Generator().manual_seed(step)
        return (torch.randn(16, size, generator=generator).to(self.device, self.dtype) for size in (12, 7))

    def train(self, steps):
        """The reset shares of each step."""
        results = []
        for _ in range(steps):
            x, y = self.batch(self.relora.steps)
            (self.net(x) - y).float().square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            results.append(self.relora.step())
        return results

    def save(self):
        file = io.BytesIO()
        parts = {name: part.state_dict() for name, part in self.parts()}
        torch.save(parts, file)
        file.seek(0)
        return file

    def load(self, file):
        state = torch.load(file, weights_only=True)
        for name, part in self.parts():
            part.load_state_dict(state[name])

    def parts(self):
        parts = {"relora": self.relora, "net": self.net, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return [(name, part) for name, part in parts.items() if part is not None]

    def weights(self):
        return {name: value.clone() for name, value in self.net.state_dict().items()}


def test_when_things_happen():
    run = Run()
    results = run.train(28)
    assert [step + 1 for step, result in enumerate(results) if result is not None] == [10, 16, 22, 28]
    assert run.relora.report.replaced == ["attn", "mlp"]
    assert run.relora.cycle == 4
    assert not run.net.attn.lora_B.any(), "the last cycle is merged"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrapping_and_restarting_keep_the_function(dtype, device):
    run = Run(device, dtype)
    x, _ = run.batch(99)
    bound = 1e-5 if dtype is torch.float32 else 2e-2
    for step in range(1, 29):
        before = None

        def remember(*_, run=run):
            nonlocal before
            before = run.net(x).detach()

        handle = run.optimizer.register_step_post_hook(remember)
        run.train(1)
        handle.remove()
        after = run.net(x)
        if step == 4 and device == "cpu":  # a GPU has another kernel for it
            assert torch.equal(after, before), "B is zero"
        assert (after - before).norm() < bound * before.norm()
        if step >= 4 and (step - 4) % 6 == 0:
            after.float().square().sum().backward()
            for layer in run.relora.layers.values():
                assert not layer.lora_B.any()
                assert layer.lora_B.grad.any()
                assert layer.lora_A.any()
            run.net.zero_grad()


def test_what_the_optimizer_holds():
    run = Run()
    run.train(3)
    assert len(run.optimizer.state) == 5
    run.train(1)
    assert not run.optimizer.state, "a new optimizer begins"
    held = {id(p) for p in run.optimizer.param_groups[0]["params"]}
    assert held == {id(p) for p in run.net.parameters() if p.requires_grad}
    assert all(isinstance(getattr(run.net, name), LoRALinear) for name in ("attn", "mlp"))
    run.train(5)
    head = copy.deepcopy(run.optimizer.state[run.net.head.weight])
    shares = run.train(1)[0]
    assert set(shares) == {"exp_avg", "exp_avg_sq"}
    assert 0.9 < shares["exp_avg"] <= 1
    assert run.optimizer.state[run.net.head.weight]["step"] == head["step"] + 1 == 6


@pytest.mark.parametrize("schedule", ["climbs", "does not climb", "has no restarts", "none"])
@pytest.mark.parametrize("reset_step", [None, True, False])
def test_adams_step_is_kept_where_the_rate_climbs_again(schedule, reset_step):
    climb, every = (0 if schedule == "does not climb" else 2), (None if schedule == "has no restarts" else 6)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    scheduler = None
    if schedule != "none":
        scheduler = jagged_cosine_schedule(optimizer, 28, 2, climb, every, warm_start_steps=4)
    relora = ReLoRA(net, optimizer, scheduler, **OPTIONS, reset_step=reset_step)
    for _ in range(10):
        net(torch.ones(2, 12)).sum().backward()
        optimizer.step()
        relora.step()
    kept = schedule == "climbs" if reset_step is None else not reset_step
    assert optimizer.state[net.attn.lora_A]["step"] == (6 if kept else 0)


def test_it_steps_the_scheduler():
    run = Run()
    rates = []
    for _ in range(28):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.train(1)
    for restart in (4, 10, 16, 22):
        assert rates[restart] < 0.5 * rates[restart - 1]


def test_a_learning_rate_of_its_own():
    plain, faster = Run(), Run(lr_factor=2.0)
    for step in range(28):
        rates = [run.optimizer.param_groups[0]["lr"] for run in (plain, faster)]
        assert rates[1] == pytest.approx(rates[0] * (2 if step >= 4 else 1))
        plain.train(1)
        faster.train(1)
    saved, resumed = faster.save(), Run(lr_factor=2.0)
    resumed.load(saved)
    assert resumed.optimizer.param_groups[0]["lr"] == faster.optimizer.param_groups[0]["lr"]
    assert resumed.scheduler.base_lrs == [0.02]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "precision"), [
    (torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, "stochastic"), (torch.bfloat16, "nearest"),
])  # fmt: skip
@pytest.mark.parametrize("killed_at", [2, 4, 7, 10, 17])
def test_a_killed_run_resumes_to_the_same_bits(killed_at, dtype, precision, device):
    whole = Run(device, dtype, precision=precision, reset_mode="random", reset_ratio=0.5)
    whole.train(22)
    first = Run(device, dtype, precision=precision, reset_mode="random", reset_ratio=0.5)
    first.train(killed_at)
    saved = first.save()
    torch.manual_seed(12345)
    second = Run(device, dtype, precision=precision, reset_mode="random", reset_ratio=0.5)
    second.load(saved)
    second.train(22 - killed_at)
    for name, value in whole.weights().items():
        assert torch.equal(value, second.weights()[name]), name
    for name, low in whole.relora.lows.items():
        assert torch.equal(low, second.relora.lows[name])


@pytest.mark.parametrize(("dtype", "precision", "lows"), [
    (torch.float32, "auto", 0), (torch.bfloat16, "auto", 2), (torch.bfloat16, "residual", 2),
    (torch.bfloat16, "nearest", 0), (torch.bfloat16, "stochastic", 0),
])  # fmt: skip
def test_residuals_where_they_help(dtype, precision, lows):
    run = Run(dtype=dtype, precision=precision)
    run.train(16)
    assert len(run.relora.lows) == lows
    for name, low in run.relora.lows.items():
        weight = run.relora.layers[name].weight
        assert low.any()
        assert torch.equal(join(weight, low).to(dtype), weight)


def test_plain_lora_never_restarts():
    run = Run(reset_every=None, schedule=False)
    assert run.train(28) == [None] * 28
    assert run.net.attn.lora_B.any()


@pytest.mark.parametrize(("base", "reset_every"), [("zero", 6), ("absent", None)])
def test_the_other_bases(base, reset_every):
    run = Run(base=base, reset_every=reset_every, warm_start_steps=0, schedule=False)
    layer = run.net.attn
    assert not layer.weight.any()
    assert layer.lora_A.any()
    assert layer.lora_B.any()
    run.train(12)
    assert layer.weight.any() == (base == "zero")


def test_ranks_begin_with_the_same_factors():
    """Whatever torch's own generator has drawn."""
    factors = []
    for drawn in (0, 7):
        run = Run()
        torch.manual_seed(drawn)
        run.train(4)
        factors.append([run.net.attn.lora_A.detach().clone()])
        run.train(6)
        factors[-1].append(run.net.attn.lora_A.detach().clone())
    assert all(torch.equal(a, b) for a, b in zip(*factors, strict=True))
    assert not torch.equal(factors[0][0], factors[0][1])
    assert not torch.equal(run.net.attn.lora_A[:, :12], run.net.mlp.lora_A[:, :12])


def test_seeds_differ():
    seeds = {mix(seed, cycle, layer) for seed in range(5) for cycle in range(20) for layer in range(50)}
    assert len(seeds) == 5000
    assert all(0 <= seed < 2**62 for seed in seeds)


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"reset_every": 0}, ValueError, "reset_every must be at least 1"),
    ({"precision": "exact"}, ValueError, "precision must be one of auto, residual, stochastic, nearest"),
    ({"base": "none"}, ValueError, "base must be one of trained, zero, absent"),
    ({"base": "zero"}, ValueError, "a warm start would be for nothing"),
    ({"base": "absent", "warm_start_steps": 0}, ValueError, "reset_every must be None"),
    ({"reset_mode": "half"}, ValueError, "reset_mode must be one of"),
    ({"reset_ratio": 2}, ValueError, "reset_ratio must be between 0 and 1"),
    ({"seed": -1}, ValueError, "seed must be at least 0"),
    ({"warm_start_steps": 0, "target_modules": ["nothing"]}, ValueError, "matches no nn.Linear"),
])  # fmt: skip
def test_wrong_options(options, error, words):
    net = Net()
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.AdamW(net.parameters())
    with pytest.raises(error, match=words):
        ReLoRA(net, optimizer, **OPTIONS | options)
    assert type(net.attn) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_an_optimizer_that_does_not_hold_the_parameters():
    net = Net()
    with pytest.raises(ValueError, match=r"optimizer must hold every parameter that is trained, it lacks attn\.weight"):
        ReLoRA(net, torch.optim.AdamW(net.head.parameters()), **OPTIONS)


def test_a_schedule_of_other_restarts():
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    scheduler = jagged_cosine_schedule(optimizer, 28, 2, 2, 8, warm_start_steps=4)
    with pytest.raises(ValueError, match=r"must be the scheduler's.* got \(6, 4\) and \(8, 4\)"):
        ReLoRA(net, optimizer, scheduler, **OPTIONS)


def test_checkpoints_of_something_else_change_nothing():
    run = Run()
    run.train(12)
    state = run.relora.state_dict()
    other = Run()
    with pytest.raises(ValueError, match="the checkpoint has r=4, this run 3"):
        other.relora.load_state_dict(state | {"options": state["options"] | {"r": 4}})
    with pytest.raises(ValueError, match=r"linear at attn is \(20, 13\), this run's is \(20, 12\)"):
        other.relora.load_state_dict(state | {"shapes": {"attn": (20, 13)}})
    with pytest.raises(ValueError, match=r"linear at layer is \(2, 2\), this run's is missing"):
        other.relora.load_state_dict(state | {"shapes": {"layer": (2, 2)} | state["shapes"]})
    assert type(other.net.attn) is nn.Linear
    with pytest.raises(ValueError, match="of the warm start, which this run has behind it"):
        run.relora.load_state_dict(Run().relora.state_dict())
    assert run.relora.steps == 12


class Rows(torch.optim.Optimizer):
    """Keeps something of its own of each parameter, from its first step on."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["rows"] = torch.ones(len(parameter))


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.Adafactor, torch.optim.Rprop, torch.optim.ASGD])
@pytest.mark.parametrize("warm_start_steps", [0, 4])
def test_an_optimizer_that_cannot_be_reset_is_refused_at_the_beginning(kind, warm_start_steps):
    net = Net()
    with pytest.raises(ValueError, match=f"^optimizer must be one that restarts can reset.*{kind.__name__}"):
        ReLoRA(net, kind(net.parameters()), **OPTIONS | {"warm_start_steps": warm_start_steps})
    assert type(net.attn) is nn.Linear


@pytest.mark.parametrize("warm_start_steps", [0, 4])
def test_an_unknown_optimizer_is_refused_as_soon_as_it_has_states(warm_start_steps):
    """A first step that was skipped, as by a GradScaler, leaves none."""
    net = Net()
    optimizer = Rows(net.parameters())
    relora = ReLoRA(net, optimizer, **OPTIONS | {"warm_start_steps": warm_start_steps})
    relora.step()
    optimizer.step()
    with pytest.raises(ValueError, match=r"^optimizer must be one that restarts can reset.*Rows keeps rows"):
        relora.step()
    assert relora.steps == 1
    with pytest.raises(ValueError, match="Rows keeps rows"):
        ReLoRA(net, optimizer, **OPTIONS | {"warm_start_steps": 0})


def test_an_optimizer_that_cannot_be_reset_trains_by_lora():
    net = Net()
    optimizer = torch.optim.Adafactor(net.parameters())
    relora = ReLoRA(net, optimizer, **OPTIONS | {"reset_every": None})
    for _ in range(8):
        net(torch.randn(4, 12)).square().sum().backward()
        optimizer.step()
        relora.step()
    assert net.attn.lora_B.any()
    before = net.attn.weight.clone()
    with pytest.raises(ValueError, match="Adafactor keeps row_var"):
        relora.restart()
    assert torch.equal(net.attn.weight, before)


@pytest.mark.parametrize("kind", [
    torch.optim.SGD, partial(torch.optim.SGD, momentum=0.9), torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop,
])  # fmt: skip
def test_other_optimizers_restart(kind):
    torch.manual_seed(1)
    net = Net()
    optimizer = kind(net.parameters(), lr=0.01)
    relora = ReLoRA(net, optimizer, reset_mode="zero", **OPTIONS)
    for _ in range(10):
        net(torch.randn(16, 12)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        relora.step()
    assert relora.cycle == 1
    moments = [optimizer.state[net.attn.lora_A].get(name) for name in MOMENTS]
    assert not any(moment.any() for moment in moments if moment is not None)
    assert not net.attn.lora_B.any()


def test_restarting_by_hand():
    run = Run()
    with pytest.raises(RuntimeError, match="the warm start is not over"):
        run.relora.restart()
    run.train(5)
    run.net.attn.merge_()
    with pytest.raises(RuntimeError, match="attn is merged"):
        run.relora.restart()
    run.net.attn.unmerge_()
    run.relora.restart()
    assert not run.net.mlp.lora_B.any()


@pytest.mark.parametrize("device", DEVICES)
def test_residuals_in_the_hosts_memory_are_the_same(device):
    runs = [Run(device, torch.bfloat16, residual_device=place) for place in ("weight", "cpu")]
    for run in runs:
        run.train(17)
    here, there = runs
    assert all(low.device.type == "cpu" and low.is_pinned() == (device == "cuda") for low in there.relora.lows.values())
    assert all(torch.equal(low.cpu(), there.relora.lows[name]) for name, low in here.relora.lows.items())
    assert any(low.any() for low in there.relora.lows.values())
    assert all(torch.equal(value, there.weights()[name]) for name, value in here.weights().items())


def test_layers_that_are_there_already_are_trained():
    run = Run()
    run.train(4)
    net = run.net
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    relora = ReLoRA(net, optimizer, reset_every=2)
    assert list(relora.layers) == ["attn", "mlp"]
    assert relora.report is None
    with pytest.raises(ValueError, match="LoRA layers already"):
        ReLoRA(net, optimizer, reset_every=2, warm_start_steps=3)


@pytest.mark.parametrize("device", DEVICES)
def test_layers_that_have_begun_keep_their_update_and_their_moments(device):
    """Adopted in the middle of a cycle: the function stays, and each factor is in the optimizer once."""
    net = Net().to(device)
    replace_linear(net, 3, 5.0, exclude_modules=["head"])
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)  # of frozen weights too
    x = torch.randn(16, 12, device=device)
    net(x).square().mean().backward()
    optimizer.step()
    before, moment = net(x), optimizer.state[net.mlp.lora_B]["exp_avg"].clone()
    ReLoRA(net, optimizer, reset_every=3)
    assert torch.equal(net(x), before)
    assert torch.equal(optimizer.state[net.mlp.lora_B]["exp_avg"], moment)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    net.mlp.merge_()
    with pytest.raises(ValueError, match="mlp is merged"):
        ReLoRA(net, optimizer, reset_every=3)


def test_frozen_weights_leave_no_gradient_behind():
    run = Run()
    for _ in range(4):
        run.optimizer.zero_grad()
        x, y = run.batch(run.relora.steps)
        (run.net(x) - y).square().mean().backward()
        run.optimizer.step()
        run.relora.step()
    assert all(p.grad is None for p in run.net.parameters() if not p.requires_grad)
    assert run.net.head.weight.grad is not None


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"r": 0}, ValueError, "r must be"),
    ({"lora_dropout": 7.0}, ValueError, "lora_dropout must be between 0 and 1"),
    ({"target_modules": ["typo"]}, ValueError, "target_modules matches no nn.Linear"),
])  # fmt: skip
def test_what_the_wrap_needs_is_asked_at_the_beginning(options, error, words):
    with pytest.raises(error, match=words):
        Run(**options)


def test_schedulers_that_do_not_fit():
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    one, two = (torch.optim.lr_scheduler.ConstantLR(optimizer) for _ in range(2))
    sequence = torch.optim.lr_scheduler.SequentialLR(optimizer, [one, two], [5])
    with pytest.raises(TypeError, match="lr_factor needs a scheduler with base_lrs, got SequentialLR"):
        ReLoRA(net, optimizer, sequence, lr_factor=2.0, **OPTIONS)
    ReLoRA(net, optimizer, sequence, **OPTIONS)
    with pytest.raises(TypeError, match="scheduler must step without a metric"):
        ReLoRA(net, optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), **OPTIONS)
    schedule = jagged_cosine_schedule(optimizer, 28, 2, 2, None, warm_start_steps=8)
    with pytest.raises(ValueError, match="must be the scheduler's"):
        ReLoRA(net, optimizer, schedule, **(OPTIONS | {"reset_every": None}))


def test_a_tensor_of_a_rate_that_groups_share_is_scaled_once():
    net = Net()
    rate = torch.tensor(0.01)
    groups = [{"params": list(net.attn.parameters()), "lr": rate}, {"params": list(net.mlp.parameters()), "lr": rate},
              {"params": list(net.head.parameters()), "lr": rate}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=rate)
    ReLoRA(net, optimizer, reset_every=3, r=3, exclude_modules=["head"], lr_factor=2.0)
    assert rate.item() == pytest.approx(0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpoints_of_other_layers_change_nothing(dtype):
    """Of more layers, of fewer, and of another dtype, whose residuals are others."""
    states = {}
    for excluded in (["head"], ["head", "mlp"]):
        run = Run(dtype=dtype, exclude_modules=excluded)
        run.train(12)
        states[len(excluded)] = run.relora.state_dict()
    for excluded, state in ((["head"], states[2]), (["head", "mlp"], states[1])):
        other = Run(dtype=dtype, exclude_modules=excluded)
        with pytest.raises(ValueError, match="the checkpoint's linear at mlp is"):
            other.relora.load_state_dict(state)
        assert (other.relora.layers, other.relora.steps) == ({}, 0)
    other = Run(dtype=torch.float16 if dtype is torch.float32 else torch.float32)
    with pytest.raises(ValueError, match="the checkpoint's residual at attn is"):
        other.relora.load_state_dict(states[1])
    assert other.relora.layers == {}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "precision"), [
    (torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, "nearest"), (torch.bfloat16, "stochastic"),
])  # fmt: skip
@pytest.mark.parametrize("steps", [3, 4, 8, 10, 13])
def test_a_run_that_ends_anywhere_is_finished_as_by_a_restart(steps, dtype, precision, device):
    """In the warm start, at its end, within a cycle and at a restart: the weights are a restart's, bit for bit."""
    ours, theirs = (Run(device, dtype, precision=precision) for _ in range(2))
    for run in (ours, theirs):
        run.train(steps)
    if theirs.relora.layers:
        theirs.relora.restart()
    keys = {"attn.weight", "attn.bias", "mlp.weight", "head.weight", "head.bias"}
    assert ours.relora.finish() is ours.net
    assert set(ours.net.state_dict()) == keys
    assert all(torch.equal(value, theirs.weights()[name]) for name, value in ours.weights().items())
    assert all(torch.equal(low, theirs.relora.lows[name]) for name, low in ours.relora.lows.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_finishing_loses_nothing(dtype):
    """Against float64: weight and low half are the sum to the last bit of float32, and the function is what it was."""
    run = Run(dtype=dtype, lora_dropout=0.3)
    run.train(13)
    layer = run.net.attn
    low = run.relora.lows.get("attn")
    before = join(layer.weight, low) if low is not None else layer.weight.detach()
    sum_ = before.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    x, _ = run.batch(99)
    wanted = run.net.eval()(x)
    run.relora.finish()
    whole = join(run.net.attn.weight, low) if low is not None else run.net.attn.weight
    assert (whole.double() - sum_).norm() < 1e-6 * sum_.norm()
    assert (run.net(x) - wanted).norm() < (1e-5 if dtype is torch.float32 else 2e-2) * wanted.norm()


def test_a_finished_model_is_a_plain_one():
    run = Run()
    run.train(8)
    weight = run.net.attn.weight.data_ptr()
    run.relora.finish()
    assert type(run.net.attn) is type(run.net.mlp) is nn.Linear
    assert run.net.attn.weight.data_ptr() == weight, "in place"
    assert all(p.requires_grad for p in run.net.parameters())
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in run.net.head.parameters()}
    assert set(run.optimizer.state) == set(held)
    optimizer = torch.optim.AdamW(run.net.parameters(), lr=0.01)
    before = run.weights()
    run.net(torch.randn(4, 12)).sum().backward()
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in run.weights().items())


def test_a_run_is_finished_once():
    run = Run()
    run.train(8)
    run.relora.finish()
    before = run.weights()
    assert run.relora.finish() is run.net
    assert all(torch.equal(value, before[name]) for name, value in run.weights().items())
    steps = run.relora.steps
    for call in (run.relora.step, run.relora.restart, run.relora.state_dict, lambda: run.relora.load_state_dict({})):
        with pytest.raises(RuntimeError, match="the run is finished"):
            call()
    assert run.relora.steps == steps


def test_a_layer_that_is_merged_by_hand_is_not_finished():
    run = Run()
    run.train(8)
    run.net.attn.merge_()
    with pytest.raises(RuntimeError, match="attn is merged: unmerge_"):
        run.relora.finish()
    assert isinstance(run.net.mlp, LoRALinear)
    run.net.attn.unmerge_()
    assert type(run.relora.finish().attn) is nn.Linear


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("ends", ["restart", "finish"])
def test_factors_that_are_not_finite_are_not_merged(ends, value, factor):
    run = Run()
    run.train(8)
    getattr(run.net.mlp, factor).data[0, 0] = value
    before = copy.deepcopy(run.net.state_dict())
    with pytest.raises(ValueError, match=f"mlp.{factor} must be finite to be merged"):
        getattr(run.relora, ends)()
    for name, tensor in run.net.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7), before[name].nan_to_num(7)), name


def test_an_offloaded_model_is_refused():
    net = Net()
    replace_linear(net, 3, lora_alpha=1.0, exclude_modules=["head"])
    accelerate.cpu_offload(net, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"attn\.lora_A is on meta, where nothing trains"):
        ReLoRA(net, torch.optim.AdamW(net.parameters()), **OPTIONS | {"warm_start_steps": 0})


@pytest.mark.parametrize(("act", "why"), [("restart", "not held by the optimizer"), ("finish", "got one on meta")])
def test_an_update_that_is_offloaded_is_not_merged(act, why):
    run = Run(warm_start_steps=0, total=24)
    run.train(3)
    x, _ = run.batch(0)
    want = run.net(x).detach()
    accelerate.cpu_offload(run.net, torch.device("cpu"))
    with pytest.raises(ValueError, match=why):
        getattr(run.relora, act)()
    torch.testing.assert_close(run.net(x).detach(), want)
    assert run.relora.cycle == 0


def test_a_step_that_is_refused_is_not_counted():
    run = Run(warm_start_steps=0, total=24)
    run.train(5)
    factor = run.net.attn.lora_B
    kept, rate = factor.detach().clone(), run.optimizer.param_groups[0]["lr"]
    factor.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="lora_B must be finite"):
        run.relora.step()
    assert (run.relora.steps, run.relora.cycle, run.scheduler.last_epoch) == (5, 0, 5)
    assert run.optimizer.param_groups[0]["lr"] == rate
    factor.data.copy_(kept)
    assert run.relora.step() is not None
    assert (run.relora.steps, run.relora.cycle, run.scheduler.last_epoch) == (6, 1, 6)


def test_a_wrap_that_fails_is_tried_again(monkeypatch):
    run = Run()
    run.train(3)

    def fails(*_):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(controller, "wrap", fails)
    with pytest.raises(torch.OutOfMemoryError):
        run.train(1)
    monkeypatch.undo()
    assert (run.relora.steps, run.scheduler.last_epoch) == (3, 3)
    run.train(1)
    assert isinstance(run.net.attn, LoRALinear)


@pytest.mark.parametrize(
    "wrapper", [lambda each: SimpleNamespace(scheduler=each), lambda each: ChainedScheduler([each])]
)
def test_schedulers_inside_others_are_looked_at(wrapper):
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    wrong = jagged_cosine_schedule(optimizer, 28, 2, 2, 8, warm_start_steps=4)
    with pytest.raises(ValueError, match="must be the scheduler's"):
        ReLoRA(net, optimizer, wrapper(wrong), **OPTIONS)
    right = jagged_cosine_schedule(optimizer, 28, 2, 2, 6, warm_start_steps=4)
    assert ReLoRA(net, optimizer, wrapper(right), **OPTIONS)._reset["reset_step"] is False


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, 20),
        lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, cycle_momentum=False),
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=1e-3),
        lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 20, eta_min=1e-3),
    ],
)
def test_schedulers_with_rates_of_their_own(make):
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    with pytest.raises(TypeError, match="whose rates are multiples of base_lrs"):
        ReLoRA(net, optimizer, make(optimizer), **OPTIONS, lr_factor=0.5)
    ReLoRA(net, optimizer, make(optimizer), **OPTIONS)


def test_a_scheduler_that_was_loaded_before():
    run = Run(lr_factor=0.5)
    run.train(8)
    states = run.relora.state_dict(), run.scheduler.state_dict()
    other = Run(lr_factor=0.5)
    other.scheduler.load_state_dict(states[1])
    with pytest.raises(ValueError, match="scheduler was loaded before ReLoRA"):
        other.relora.load_state_dict(states[0])
    assert type(other.net.attn) is nn.Linear


def test_residuals_of_another_dtype():
    run = Run(dtype=torch.bfloat16)
    run.train(12)
    state = run.relora.state_dict()
    lows = {name: low.float() for name, low in state["lows"].items()}
    other = Run(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"residual at attn must be int16, got torch\.float32"):
        other.relora.load_state_dict(state | {"lows": lows})
    assert type(other.net.attn) is nn.Linear
