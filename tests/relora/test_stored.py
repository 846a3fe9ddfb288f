"""ReLoRA over weights in a format: what a restart keeps, that it is whole or not at all, and that runs resume."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

from fused_lora import replace_linear
from fused_lora.formats import FP8, NF4, dequantise, merging
from fused_lora.hashing import hash_bits
from fused_lora.reference import new_A
from fused_lora.relora import ReLoRA, stored
from fused_lora.relora.seeds import mix
from tests.modules.bases import assert_same, base_state, bits, every_format, linear
from tests.relora.test_controller import Run

PRECISIONS = ["auto", "residual", "stochastic", "nearest"]
quietly = pytest.mark.filterwarnings("ignore:.* arrived in its quantised weight")


class Net(nn.Module):
    """Two layers over codes and one over 16 bits or more, of sizes that no block divides; lora_alpha / r is 5/3."""

    def __init__(self, form, dtype=torch.float32):
        super().__init__()
        self.first, self.second, self.third = linear(12, 70, dtype), linear(70, 12, dtype), linear(12, 12, dtype)
        self.head = nn.Linear(12, 7, dtype=dtype)
        replace_linear(self, 3, 5.0, target_modules=["first", "second"], base=form)
        replace_linear(self, 3, 5.0, target_modules=["third"])

    def forward(self, x):
        return self.head(self.third(x) + 0.1 * self.second(torch.tanh(self.first(x))))


class OverCodes(Run):
    """test_controller's training, of this net."""

    def __init__(self, form, dtype=torch.float32, device="cpu", **options):
        torch.manual_seed(1)
        self.net = Net(form, dtype).to(device)
        trained = [each for each in self.net.parameters() if each.requires_grad]
        self.optimizer, self.scheduler = torch.optim.AdamW(trained, lr=options.pop("lr", 0.01)), None
        self.relora = ReLoRA(self.net, self.optimizer, **{"reset_every": 3, "reset_mode": "zero"} | options)
        self.device, self.dtype = device, dtype

    def everything(self):
        """Bit by bit, with what lies beside weights."""
        state = {name: (bits(each).clone(), each.dtype) for name, each in self.net.state_dict().items()}
        return state | {f"{name} low": (bits(low).clone(), low.dtype) for name, low in self.relora.lows.items()}


def total_of(run, name):
    """What a layer stands for with its residual and its update, by hand."""
    layer, low = getattr(run.net, name), run.relora.lows.get(name)
    total = dequantise(layer.frozen_weight).double() + 5 / 3 * layer.lora_B.double() @ layer.lora_A.double()
    return (total if low is None else total + low.double()).detach()


@every_format
@pytest.mark.parametrize("precision", ["auto", "residual"])
def test_a_residual_keeps_a_chain_of_small_updates(precision, form):
    """Each far below a step between codes, in which the nearest would lose them."""
    run = OverCodes(form, precision=precision, lr=1e-3, reset_every=100)
    before = {name: total_of(run, name) for name in ("first", "second")}
    sums = copy.deepcopy(before)
    for _ in range(6):
        run.train(2)
        for name in sums:
            layer = getattr(run.net, name)
            sums[name] += 5 / 3 * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        run.relora.restart()
    for name, sum_ in sums.items():
        low, update = run.relora.lows[name], sum_ - before[name]
        assert (low.dtype, low.device.type) == (torch.bfloat16, "cpu")
        assert update.norm() < 0.02 * sum_.norm()
        assert (total_of(run, name) - sum_).norm() < 0.2 * update.norm()
        assert run.relora.arrived[name].share == pytest.approx(1, abs=0.05)
        assert not getattr(run.net, name).lora_B.any()
    assert set(run.relora.arrived) == set(run.relora.lows) == {"first", "second"}


@every_format
@pytest.mark.parametrize("precision", PRECISIONS)
@quietly
def test_one_restart(precision, form):
    """The specification's merge, by the layer's own format and a seed of its own; a residual has the rest."""
    run = OverCodes(form, precision=precision, lr=0.003)
    run.train(2)
    totals = {name: total_of(run, name) for name in ("first", "second")}
    wanted = {}
    for i, name in enumerate(totals):
        layer, low = getattr(run.net, name), run.relora.lows.get(name)
        wanted[name] = layer.frozen_weight._replace(**{
            name: tensor if tensor is None else tensor.detach().clone()
            for name, tensor in zip(("codes", "scale", "outer"), layer.frozen_weight.tensors, strict=True)
        })  # fmt: skip
        random = {"rounding": "stochastic", "seed": mix(mix(0, 1, i), 1)} if precision == "stochastic" else {}
        random |= {} if low is None else {"residual": low.clone()}
        merging.merge_(wanted[name], form, layer.lora_A, layer.lora_B, 5 / 3, **random)
    run.relora.restart()
    for i, (name, total) in enumerate(totals.items()):
        layer = getattr(run.net, name)
        assert torch.equal(layer.frozen_weight.bytes(), wanted[name].bytes())
        if precision in ("auto", "residual"):
            error = (total_of(run, name) - total).abs()
            assert (error <= 2**-8 * run.relora.lows[name].abs() + 3e-7 * total.abs().max()).all()
        assert torch.equal(layer.lora_A, new_A(3, layer.in_features, torch.tensor(mix(0, 1, i))))
        assert not layer.lora_B.any()
    assert bool(run.relora.lows) == (precision in ("auto", "residual"))


@every_format
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("killed_at", [2, 3, 7])
@quietly
def test_a_killed_run_resumes_to_the_same_bits(killed_at, precision, form):
    options = {"precision": precision, "dtype": torch.bfloat16, "reset_mode": "random", "reset_ratio": 0.5}
    whole, first = OverCodes(form, **options), OverCodes(form, **options)
    whole.train(10)
    first.train(killed_at)
    saved = first.save()
    torch.manual_seed(12345)
    second = OverCodes(form, **options)
    second.load(saved)
    second.train(10 - killed_at)
    assert_same(whole.everything(), second.everything())
    assert any(name.endswith(" low") for name in whole.everything()) == (precision in ("auto", "residual"))


@every_format
def test_residuals_in_the_hosts_memory_are_the_same(form):
    here, there = OverCodes(form), OverCodes(form, residual_device="cpu")
    for run in (here, there):
        run.train(7)
    assert_same(here.everything(), there.everything())


@every_format
@pytest.mark.parametrize("precision", PRECISIONS)
@quietly
def test_a_restart_that_breaks_off(precision, form, monkeypatch):
    """A layer has restarted or not: nothing is in W twice. Again, it ends in the bits of one that did not break."""
    whole, broken = (OverCodes(form, precision=precision) for _ in range(2))
    for run in (whole, broken):
        run.train(2)
    before, real, calls = broken.everything(), merging._write, []

    def breaks(*arguments):
        calls.append(real(*arguments))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("of the second")
        return calls[-1]

    monkeypatch.setattr(merging, "_write", breaks)
    with pytest.raises(RuntimeError, match="of 2 layers in a format only first restarted: of the second"):
        broken.relora.restart()
    monkeypatch.undo()
    assert broken.relora.cycle == 0
    after = broken.everything()
    assert_same(*({name: each for name, each in of.items() if name.startswith("second")} for of in (before, after)))
    assert not broken.net.first.lora_B.any()
    broken.relora.restart()
    whole.relora.restart()
    assert_same(whole.everything(), broken.everything())


@every_format
@pytest.mark.parametrize("name", ["second", "third"])
def test_what_is_not_finite_changes_nothing(name, form):
    """Of any layer, wherever it stands; also where the factors are finite and their product is not."""
    for value in (torch.nan, 1e30):
        run = OverCodes(form)
        run.train(2)
        if name == "third" and value == 1e30:
            continue
        with torch.no_grad():
            getattr(run.net, name).lora_B.fill_(value)
            getattr(run.net, name).lora_A.fill_(value)
        before = run.everything()
        with pytest.raises(ValueError, match=rf"{name}(\.lora_[AB]|: W \+ scale B A) must be finite"):
            run.relora.restart()
        assert_same(before, run.everything())
        assert run.relora.cycle == 0


@every_format
def test_what_is_lost_is_told(form):
    """Once, of the layer that has least, after all is done."""
    run = OverCodes(form, precision="nearest", lr=1e-5)
    run.train(2)
    with pytest.warns(UserWarning, match=r"(first|second)'s update arrived in its quantised weight") as told:
        run.train(1)
    assert (run.relora.steps, run.relora.cycle, len(told)) == (3, 1, 1)
    least = min(run.relora.arrived.values(), key=lambda each: each.share)
    assert str(told[0].message).startswith(f"{least.share:.1%} of ")
    assert least.share < 0.5
    run = OverCodes(form, lr=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.train(3)


@every_format
@pytest.mark.parametrize("precision", ["auto", "nearest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@quietly
def test_finish(dtype, precision, form):
    """A plain model of what codes and residuals are together, rounded once."""
    run = OverCodes(form, dtype, precision=precision)
    run.train(8)
    totals = {name: total_of(run, name) for name in ("first", "second")}
    x, _ = run.batch(99)
    y = run.net(x).detach()
    plain = run.relora.finish()
    assert [type(each) for each in plain.children()] == [nn.Linear] * 4
    for name, total in totals.items():
        weight = getattr(plain, name).weight
        assert (weight.dtype, weight.requires_grad) == (dtype, True)
        error = (weight.double() - total).norm() / total.norm()
        assert error < (1e-3 if precision == "auto" else 0.15) + torch.finfo(dtype).eps
    assert set(run.relora.lows) == ({"third"} if dtype is torch.bfloat16 and precision == "auto" else set())
    assert (plain(x) - y).norm() < (0.03 if precision == "auto" else 0.2) * y.norm()


def test_weights_of_zero_are_not_for_codes():
    net = Net(NF4())
    before = base_state(net)
    with pytest.raises(ValueError, match="base='zero' forgets the weights, and first's is quantised"):
        ReLoRA(net, torch.optim.AdamW(net.parameters()), reset_every=3, base="zero")
    assert_same(before, base_state(net))


def test_residuals_of_another_dtype():
    run = OverCodes(FP8("rows"))
    run.train(3)
    state = run.relora.state_dict()
    state["lows"]["second"] = state["lows"]["second"].short()
    with pytest.raises(ValueError, match=r"residual at second must be bfloat16, got torch\.int16"):
        OverCodes(FP8("rows")).relora.load_state_dict(state)


def rows_of(seed):
    return {tuple(row) for row in hash_bits(64, 4, torch.tensor(seed)).tolist()}


def test_neighbouring_runs_cycles_and_layers_round_differently(monkeypatch):
    """A hash's rows are of row ^ seed: small neighbouring seeds have rows in common."""
    assert rows_of(2) & rows_of(3)
    seeds = []
    real = stored.prepared
    monkeypatch.setattr(stored, "prepared", lambda *options: seeds.append(options[6]) or real(*options))
    for seed in (0, 1, 2):
        run = OverCodes(NF4(), precision="stochastic", seed=seed)
        for _ in range(2):
            run.relora.restart()
    beginnings = [mix(seed, cycle, layer) for seed, cycle, layer in itertools.product((0, 1, 2), (1, 2), (0, 1))]
    assert len(seeds) == len(beginnings) == 12
    assert min(seeds) > 2**50
    rows = [rows_of(seed) for seed in (*seeds, *beginnings)]
    assert len(set.union(*rows)) == sum(map(len, rows))
