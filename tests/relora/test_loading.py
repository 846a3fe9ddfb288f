"""States that are loaded in another order than they need: an error that says so, and nothing lost without a word."""

import copy

import pytest
import torch
from torch import nn

from fused_lora.relora import ReLoRA
from fused_lora.relora.loading import refuse_other_phases
from tests.relora.test_controller import OPTIONS, Net, Run


def state_of(steps, part):
    run = Run()
    run.train(steps)
    return getattr(run, part).state_dict()


class Square(nn.Module):
    """One linear with a bias: two parameters in the warm start and two factors after it."""

    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(12, 12)

    def forward(self, x):
        return self.attn(x)


@pytest.mark.filterwarnings("ignore:exclude_modules entry")  # of the models, some have no head
@pytest.mark.parametrize(("saved_at", "loaded_at"), [(2, 8), (8, 2), (8, 0)])
@pytest.mark.parametrize("net", [Net, Square])
def test_an_optimizers_state_of_the_other_phase(net, saved_at, loaded_at, monkeypatch):
    """Whether the numbers of parameters differ, or only their shapes, at which torch does not look."""
    monkeypatch.setattr("tests.relora.test_controller.Net", net)
    monkeypatch.setattr(Run, "batch", lambda self, step: (torch.ones(3, 12), torch.tensor(1.0)))
    saved, run = Run(), Run()
    saved.train(saved_at)
    run.train(loaded_at)
    before = str(run.optimizer.state_dict())
    with pytest.raises(ValueError, match="the state is of other parameters than the optimizer's: load ReLoRA's state"):
        run.optimizer.load_state_dict(saved.optimizer.state_dict())
    assert str(run.optimizer.state_dict()) == before


def test_a_state_of_the_same_phase_in_either_order():
    for steps in (2, 8):
        saved = Run()
        saved.train(steps)
        states = saved.save()
        for order in (1, -1) if steps == 2 else (1,):
            run = Run()
            states.seek(0)
            loaded = torch.load(states, weights_only=True)
            for name, part in run.parts()[::order]:
                part.load_state_dict(loaded[name])
            for each in (run, whole := Run()):
                each.train(10 - each.relora.steps)
            assert all(torch.equal(value, run.weights()[name]) for name, value in whole.weights().items())


def test_states_that_a_wrap_would_clear_are_not_lost_silently():
    """Of an optimizer that has trained: where ReLoRA wraps at once, and where a checkpoint makes it."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(4, 12)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="optimizer has states already, which it would lose"):
        ReLoRA(net, optimizer, **OPTIONS | {"warm_start_steps": 0})
    assert type(net.attn) is nn.Linear
    run = Run()
    run.train(2)
    with pytest.raises(ValueError, match="load its state after ReLoRA's"):
        run.relora.load_state_dict(state_of(8, "relora"))
    assert type(run.net.attn) is nn.Linear
    assert (run.relora.steps, len(run.optimizer.state)) == (2, 5)


class Wrapper(torch.optim.Optimizer):
    """As Accelerate's: everything is another's."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)


def test_optimizers_in_wrappers():
    net = Net()
    optimizer = Wrapper(torch.optim.AdamW(net.parameters()))
    ReLoRA(net, optimizer, **OPTIONS)
    with pytest.raises(ValueError, match="the state is of other parameters"):
        optimizer.load_state_dict(state_of(8, "optimizer"))
    with pytest.raises(ValueError, match="Adafactor"):
        ReLoRA(net, Wrapper(torch.optim.Adafactor(net.parameters())), **OPTIONS)


def test_only_moments_are_compared():
    """A state of another kind, of another shape than its parameter's, is no sign of anything."""
    optimizer = torch.optim.Adafactor([nn.Parameter(torch.ones(3, 4))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3, 4)
    optimizer.step()
    refuse_other_phases(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [2, 4, 8, 10])
def test_a_state_for_a_run_of_which_all_else_is_there(steps, dtype):
    """In the warm start, at its end, in a cycle and at a restart: nothing begins anew."""
    run = Run(dtype=dtype, lr_factor=1.5)
    run.train(steps)
    state = copy.deepcopy(run.relora.state_dict())
    again = copy.deepcopy(run)  # its controller knows more than a state does
    options = OPTIONS | {"lr_factor": 1.5}
    again.relora = ReLoRA(again.net, again.optimizer, again.scheduler, **options, state=state)
    for each in (run, again):
        each.train(28 - steps)
    assert all(torch.equal(value, again.weights()[name]) for name, value in run.weights().items())
    assert all(torch.equal(low, again.relora.lows[name]) for name, low in run.relora.lows.items())
    assert again.relora.lows.keys() == run.relora.lows.keys()


def test_a_state_of_other_options():
    run = Run()
    run.train(8)
    with pytest.raises(ValueError, match="the checkpoint has seed=0, this run 1"):
        ReLoRA(run.net, run.optimizer, run.scheduler, **OPTIONS, seed=1, state=run.relora.state_dict())


def test_a_scheduler_that_another_steps():
    run = Run()
    run.relora.steps_scheduler = False
    run.train(5)
    assert run.scheduler.last_epoch == 0
