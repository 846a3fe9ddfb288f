"""The reset of Adam's moments: as much as asked, of whom it was asked, and of nobody else."""

import contextlib
import copy
import math

import pytest
import torch

from fused_lora.relora import optimizer_reset
from fused_lora.relora.optimizer_reset import COUNTS, REFUSED, check_kind

OPTIMIZERS = {
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "foreach": (torch.optim.AdamW, {"foreach": True}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "capturable": (torch.optim.AdamW, {"capturable": True, "foreach": False}),
}
ADAMS = ("exp_avg", "exp_avg_sq")


class Lion(torch.optim.Optimizer):
    """As published: the sign of a mean of gradients. Chen et al. 2023, arXiv:2302.06675."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                mean = state.setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(mean.lerp(p.grad, 0.1).sign(), alpha=group["lr"])
                mean.lerp_(p.grad, 0.01)


OTHERS = {
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "adamax": (torch.optim.Adamax, {}),
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "adadelta": (torch.optim.Adadelta, {}),
    "lion": (Lion, {}),
}


def trained(name="adamw", dtype=torch.float32, device="cpu", steps=3):
    """(optimizer, factors, others) after a few steps."""
    torch.manual_seed(0)
    shapes = [(8, 40), (50, 8), (7,), (20, 30)]
    parameters = [torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
    kind, options = (OPTIMIZERS | OTHERS)[name]
    optimizer = kind(parameters, lr=1e-3, **options)
    train(optimizer, steps)
    return optimizer, parameters[:2], parameters[2:]


def train(optimizer, steps):
    for _ in range(steps):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


PLACES = [
    *(pytest.param("cpu", name, id=f"cpu-{name}") for name in OPTIMIZERS if name != "capturable"),
    *(pytest.param("cuda", name, id=f"cuda-{name}", marks=pytest.mark.gpu) for name in OPTIMIZERS),
]


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("mode", ["magnitude", "random"])
@pytest.mark.parametrize(("device", "name"), PLACES)
def test_the_share_that_was_asked(device, name, mode, ratio):
    optimizer, factors, others = trained(name, device=device)
    before = {p: copy.deepcopy(optimizer.state[p]) for p in (*factors, *others)}
    pointers = [t.data_ptr() for p in factors for t in optimizer.state[p].values()]
    shares = optimizer_reset(optimizer, factors, mode, ratio)
    sizes = [p.numel() for p in factors]
    expected = sum(round(ratio * size) for size in sizes) / sum(sizes)
    assert shares == dict.fromkeys([*ADAMS, "max_exp_avg_sq"] if name == "amsgrad" else ADAMS, expected)
    assert pointers == [t.data_ptr() for p in factors for t in optimizer.state[p].values()]
    for p in others:
        assert all(torch.equal(value, before[p][key]) for key, value in optimizer.state[p].items())
    for p in factors:
        state = optimizer.state[p]
        kept = state["exp_avg"] != 0
        assert int(kept.sum()) == p.numel() - round(ratio * p.numel())
        for key in state.keys() - COUNTS:
            assert torch.equal(state[key] != 0, kept), "one mask for all moments"
            assert torch.equal(state[key][kept], before[p][key][kept])
        assert state["step"] == 0
        if mode == "magnitude" and 0 < int(kept.sum()) < p.numel():
            old = before[p]["exp_avg"].abs()
            assert old[kept].min() >= old[~kept].max()


def test_zero_keeps_nothing_whatever_the_ratio():
    optimizer, factors, _ = trained()
    assert optimizer_reset(optimizer, factors, "zero", 0.0) == dict.fromkeys(ADAMS, 1.0)
    assert all(not optimizer.state[p][name].any() for p in factors for name in ADAMS)


def test_ties_neither_empty_nor_fill_a_tensor():
    optimizer, factors, _ = trained()
    for p in factors:
        optimizer.state[p]["exp_avg"].fill_(0.25)
    assert optimizer_reset(optimizer, factors, "magnitude", 0.75) == dict.fromkeys(ADAMS, 0.75)
    for p in factors:
        assert int((optimizer.state[p]["exp_avg"] != 0).sum()) == p.numel() // 4


def test_what_is_not_finite_is_zeroed_too():
    optimizer, factors, _ = trained()
    optimizer.state[factors[0]]["exp_avg_sq"].fill_(math.inf)
    optimizer_reset(optimizer, factors, "zero")
    assert not optimizer.state[factors[0]]["exp_avg_sq"].any()


def test_random_follows_its_generator():
    results = []
    for seed in (1, 1, 2):
        optimizer, factors, _ = trained()
        optimizer_reset(optimizer, factors, "random", 0.5, generator=torch.Generator().manual_seed(seed))
        results.append(optimizer.state[factors[0]]["exp_avg"].clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("reset_step", [True, False])
def test_the_first_update_after_it(reset_step):
    """Bias correction makes it one learning rate; with the step kept it is sqrt(10) of them, as in the paper's code."""
    optimizer, factors, _ = trained(steps=5000 if not reset_step else 3)
    optimizer_reset(optimizer, factors, "zero", reset_step=reset_step)
    assert (optimizer.state[factors[0]]["step"] == 0) == reset_step
    before = factors[0].detach().clone()
    factors[0].grad = torch.ones_like(factors[0])
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    moved = (before - factors[0]).abs().mean().item() / 1e-3
    assert abs(moved - (1 if reset_step else math.sqrt(10))) < 0.02


def test_parameters_without_a_state_have_nothing_to_reset():
    optimizer, factors, _ = trained(steps=0)
    assert optimizer_reset(optimizer, factors) == {}
    assert not optimizer.state


def test_a_parameter_named_twice_is_reset_once():
    optimizer, factors, _ = trained()
    assert optimizer_reset(optimizer, [*factors, *factors], "random", 0.5) == dict.fromkeys(ADAMS, 0.5)
    assert int((optimizer.state[factors[0]]["exp_avg"] != 0).sum()) == factors[0].numel() // 2


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"mode": "half"}, ValueError, "mode must be one of magnitude, random, zero, got 'half'"),
    ({"ratio": 1.5}, ValueError, "ratio must be between 0 and 1, got 1.5"),
    ({"ratio": math.nan}, ValueError, "ratio must be between 0 and 1, got nan"),
    ({"ratio": "all"}, TypeError, "ratio must be a number, got str"),
])  # fmt: skip
def test_wrong_options_change_nothing(options, error, words):
    optimizer, factors, _ = trained()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=words):
        optimizer_reset(optimizer, factors, **options)
    assert_same_state(optimizer, before)


def test_a_stranger_among_the_parameters_changes_nothing():
    optimizer, factors, _ = trained()
    before = copy.deepcopy(optimizer.state_dict())
    stranger = torch.nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"parameters\[2\], of shape \(2, 3\), is not held by the optimizer"):
        optimizer_reset(optimizer, [*factors, stranger])
    assert_same_state(optimizer, before)


@pytest.mark.parametrize("name", [*(name for name in OPTIMIZERS if name != "capturable"), *OTHERS])
def test_a_full_reset_is_a_new_optimizer(name):
    """The rule, whatever the optimizer: the weights that follow are those of one that begins here."""
    optimizer, factors, others = trained(name, steps=7)
    kind, options = (OPTIMIZERS | OTHERS)[name]
    twins = [parameter.detach().clone().requires_grad_() for parameter in (*factors, *others)]
    optimizer_reset(optimizer, [*factors, *others], "zero")
    new = kind(twins, lr=1e-3, **options)
    for each in (optimizer, new):
        torch.manual_seed(5)
        train(each, 3)
    for ours, theirs in zip((*factors, *others), twins, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("name", "first"), [("momentum", "momentum_buffer"), ("rmsprop", "momentum_buffer"),
    ("adadelta", "square_avg"), ("lion", "exp_avg"), ("nadam", "exp_avg"), ("adamax", "exp_avg")])  # fmt: skip
def test_one_mask_for_all_moments_of_any_optimizer(name, first):
    optimizer, factors, _ = trained(name)
    before = copy.deepcopy(optimizer.state[factors[1]])
    assert set(optimizer_reset(optimizer, factors, ratio=0.75).values()) == {0.75}
    state = optimizer.state[factors[1]]
    kept = state[first] != 0
    assert int(kept.sum()) == factors[1].numel() // 4
    assert before[first].abs()[kept].min() >= before[first].abs()[~kept].max()
    for key in state.keys() - COUNTS:
        assert torch.equal(state[key], torch.where(kept, before[key], 0))


class Codes(torch.Tensor):
    """Of 8 bits, say."""


def keeps(**state):
    """An optimizer that keeps this of its one parameter, (2, 3)."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1)
    optimizer.state[optimizer.param_groups[0]["params"][0]].update(state)
    return optimizer


@pytest.mark.parametrize(("state", "words"), [
    ({"exp_avg": torch.ones(2, 3), "exp_avg_sq_row": torch.ones(2)}, "SGD keeps exp_avg_sq_row"),
    ({"exp_avg": torch.ones(2)}, "SGD keeps exp_avg"),
    ({"exp_avg": torch.ones(2, 3, dtype=torch.uint8)}, "SGD keeps exp_avg"),
    ({"exp_avg": torch.ones(2, 3).as_subclass(Codes)}, r"SGD keeps exp_avg \(Codes\)"),
    ({"state1": torch.ones(2, 3), "step": 3}, r"SGD keeps state1 \(Tensor\)"),
    ({"momentum_buffer": [1.0]}, r"SGD keeps momentum_buffer \(list\)"),
])  # fmt: skip
def test_states_that_zeros_would_not_make_new_are_refused(state, words):
    optimizer = keeps(**state)
    before = str(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"^optimizer must be one that restarts can reset.*{words}"):
        optimizer_reset(optimizer, optimizer.param_groups[0]["params"])
    assert str(optimizer.state_dict()) == before


def test_a_momentum_that_is_not_there_yet():
    optimizer = keeps(momentum_buffer=None)
    assert optimizer_reset(optimizer, optimizer.param_groups[0]["params"]) == {}


def torchs_own():
    """Every optimizer of torch, and the others of the tests, that can train a matrix without more than its gradient."""
    classes = [getattr(torch.optim, name) for name in torch.optim.__all__]
    found = {c for c in classes if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)}
    return sorted(found - {torch.optim.Optimizer, torch.optim.SparseAdam}, key=lambda c: c.__name__)


@pytest.mark.parametrize("kind", torchs_own(), ids=lambda kind: kind.__name__)
def test_what_is_known_of_a_class_is_what_its_states_say(kind):
    """At construction an optimizer is refused exactly where its first states would be."""
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = kind([parameter])
    parameter.grad = torch.rand(4, 4)
    optimizer.step(lambda: parameter.square().sum())
    refused = isinstance(optimizer, REFUSED)
    for ask in (lambda: check_kind(optimizer), lambda: optimizer_reset(optimizer, [parameter])):
        with pytest.raises(ValueError, match=kind.__name__) if refused else contextlib.nullcontext():
            ask()


def assert_same_state(optimizer, before):
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before["state"][index][key]) for key, value in state.items())
