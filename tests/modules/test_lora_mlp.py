"""Gated MLPs computed as one: the same numbers as their three layers, and only where that is what a module does."""

import copy
import inspect
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fused_lora import replace_linear
from fused_lora.modules import LoRALinear, LoRAMLP
from fused_lora.modules.lora_mlp import Structure, recognise
from fused_lora.modules.mixins import unmix


class GatedMLP(nn.Module):
    """One as models write them, under names of its own."""

    def __init__(self, act=None, bias=True):
        super().__init__()
        self.w1, self.w3 = nn.Linear(16, 24, bias), nn.Linear(16, 24, bias)
        self.w2 = nn.Linear(24, 16, bias)
        self.act = act or nn.SiLU()
        self.activation, self.names, self.layers = "silu", [], 1  # names that a fused one could want for itself
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, hidden_states):
        return self.w2(self.act(self.w1(hidden_states)) * self.w3(hidden_states))


class Holder(nn.Module):
    """A model around an MLP."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return x + self.mlp(x)


def make_pair(mlp=None, **options):
    """The same model twice: three layers, and one MLP."""
    torch.manual_seed(0)
    alone = Holder(mlp or GatedMLP())
    fused = copy.deepcopy(alone)
    options = {"r": 4, "lora_alpha": 8} | options
    replace_linear(alone, **options, fuse="off")
    report = replace_linear(fused, **options)
    for layer in (alone.mlp.w1, alone.mlp.w2, alone.mlp.w3):
        nn.init.normal_(layer.lora_B, std=0.1)
    fused.load_state_dict(alone.state_dict())
    assert report.mlps == ["mlp"]
    assert report.groups == []
    assert isinstance(fused.mlp, LoRAMLP)
    return alone, fused


def gradients(model, x):
    model(x).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("save", ["all", "less"])
@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(approximate="tanh")], ids=["silu", "gelu"])
def test_an_mlp_gives_what_its_layers_give(act, save, as_one):
    alone, fused = make_pair(GatedMLP(act))
    fused.mlp.save = save
    x = torch.randn(5, 3, 16)
    theirs, ours = gradients(alone, x), gradients(fused, x)
    assert torch.allclose(fused(x), alone(x), atol=1e-5)
    assert theirs.keys() == ours.keys()
    for name, grad in theirs.items():
        assert (grad is None) == (ours[name] is None)
        assert grad is None or torch.allclose(ours[name], grad, rtol=1e-4, atol=1e-4), name
    assert [options["save"] for options in as_one] == [save] * 2


def test_without_kernels_for_it_its_own_forward_runs():
    alone, fused = make_pair()
    x = torch.randn(3, 16)
    assert fused.mlp.why_not(x) == "no kernel for device cpu"
    assert torch.allclose(fused(x), alone(x), atol=1e-6)


def test_the_module_stays_what_it_is(as_one):
    mlp = GatedMLP()
    seen = []
    mlp.register_forward_hook(lambda module, args, y: seen.append(y))
    mlp.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({prefix + "more": torch.ones(1)}))
    alone, fused = Holder(copy.deepcopy(mlp)), Holder(mlp)
    kept = {name: value for name, value in vars(mlp).items() if not name.startswith("_")}
    assert replace_linear(fused, r=2, lora_alpha=1.0).mlps == ["mlp"]
    assert fused.mlp is mlp
    assert isinstance(mlp, GatedMLP)
    assert type(mlp).__name__ == "GatedMLP", "libraries find modules by it"
    assert list(inspect.signature(mlp.forward).parameters) == ["hidden_states"]
    assert {name: getattr(mlp, name) for name in kept} == kept
    assert fused.state_dict().keys() >= alone.state_dict().keys()
    y = mlp(hidden_states=torch.randn(3, 16))
    assert seen == [y]
    assert len(as_one) == 1


def broken_rules(fused):
    """Changes of an MLP after which its own forward must run; each a pair of do and undo."""
    mlp = fused.mlp
    handles = []
    yield lambda: mlp.w1.merge_(), lambda: mlp.w1.unmerge_()
    yield lambda: handles.append(mlp.w3.register_forward_hook(lambda *_: None)), lambda: handles.pop().remove()
    yield lambda: handles.append(mlp.act.register_forward_hook(lambda *_: None)), lambda: handles.pop().remove()
    every = nn.modules.module.register_module_forward_hook
    yield lambda: handles.append(every(lambda *_: None)), lambda: handles.pop().remove()
    yield lambda: setattr(mlp.w2, "forward", mlp.w2.forward), lambda: delattr(mlp.w2, "forward")
    yield lambda: setattr(mlp.w2, "lora_dropout", 0.5), lambda: setattr(mlp.w2, "lora_dropout", 0.0)
    act, forward = mlp.act, GatedMLP.forward
    yield lambda: setattr(mlp, "act", nn.SiLU()), lambda: setattr(mlp, "act", act)
    yield lambda: setattr(act, "forward", torch.relu), lambda: delattr(act, "forward")
    other = lambda self, x: forward(self, x) + 1  # noqa: E731  as libraries patch the classes of others
    yield lambda: setattr(GatedMLP, "forward", other), lambda: setattr(GatedMLP, "forward", forward)


def test_its_own_forward_runs_where_that_could_matter(as_one):
    alone, fused = make_pair()
    x = torch.randn(3, 16)
    wanted = alone(x)
    for number, (do, undo) in enumerate(broken_rules(fused)):
        do()
        y = fused(x)
        assert fused.mlp.why_not(x)
        assert len(as_one) == number
        undo()
        assert torch.allclose(fused(x), wanted, atol=1e-5)
        assert len(as_one) == number + 1
        assert y.shape == wanted.shape


def test_children_can_be_replaced(as_one):
    alone, fused = make_pair()
    x = torch.randn(3, 16)
    for name in ("w1", "w3", "w2"):
        setattr(fused.mlp, name, getattr(fused.mlp, name).to_linear())
        assert torch.allclose(fused(x), alone(x), atol=1e-5)
    assert as_one == []


def test_evaluation_drops_nothing(as_one):
    alone, fused = make_pair(lora_dropout=0.5)
    x = torch.randn(3, 16)
    assert not torch.allclose(fused(x), alone.eval()(x))
    assert torch.allclose(fused.eval()(x), alone(x), atol=1e-5)
    assert [options["p"] for options in as_one] == [0.5, 0.0]


def test_copies_and_pickles(as_one):
    alone, fused = make_pair()
    x = torch.randn(3, 16)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(twin(x), fused(x))
        assert twin.state_dict().keys() == alone.state_dict().keys()
        assert twin.mlp.why_not(x) is None
        assert twin.mlp.w1 is not fused.mlp.w1
    assert len(as_one) == 4


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("fuses", [False, True])
def test_compiled_in_one_graph(fuses, request):
    if fuses:
        request.getfixturevalue("as_one")
    alone, fused = make_pair()
    x = torch.randn(3, 16)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(fused, fullgraph=True, backend="eager")(x), alone(x), atol=1e-5)


class Swapped(GatedMLP):
    def forward(self, x):
        return self.w2(torch.mul(self.w3(x), F.silu(self.w1(x))))


class Scaled(GatedMLP):
    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x) * 2)


class Branching(GatedMLP):
    def forward(self, x):
        if x.sum() > 0:
            x = -x
        return super().forward(x)


class Ungated(GatedMLP):
    def forward(self, x):
        return self.w2(self.act(self.w1(x)) + self.w3(x))


class Squared(GatedMLP):
    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w1(x))


class DropsInTraining(GatedMLP):
    def forward(self, x):
        return super().forward(F.dropout(x) if self.training else x)


class WithoutGradients(GatedMLP):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class WithoutAutocast(GatedMLP):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Checkpointed(GatedMLP):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Clipped(GatedMLP):
    def forward(self, x):
        return self.w2(F.silu(self.w1(x).clamp(max=50)) * self.w3(x))


class Counting(GatedMLP):
    def forward(self, x):
        self.layers += 1
        self.names.append(x)
        return super().forward(x)


class Keywords(GatedMLP):
    def forward(self, x):
        return self.w2(torch.mul(input=self.act(self.w1(x)), other=self.w3(x)))


class Flagged(GatedMLP):
    doubles = False

    def forward(self, x):
        h = self.act(self.w1(x)) * self.w3(x)
        if self.doubles:
            h = h * 2
        return self.w2(h)


class OfConfig(GatedMLP):
    config = SimpleNamespace(doubles=False)

    def forward(self, x):
        return self.w2(
            self.act(self.w1(x)) * self.w3(x) * 2 if self.config.doubles else self.act(self.w1(x)) * self.w3(x)
        )


class OfModes(GatedMLP):
    def forward(self, x):
        h = self.act(self.w1(x)) * self.w3(x)
        return self.w2(h if torch.is_grad_enabled() else 2 * h)


class OfItsFunction(GatedMLP):
    function = staticmethod(F.silu)

    def forward(self, x):
        return self.w2(self.function(self.w1(x)) * self.w3(x))


class OfItsMethod(GatedMLP):
    def hidden(self, x):
        return self.act(self.w1(x)) * self.w3(x)

    def forward(self, x):
        return self.w2(self.hidden(x))


class WithoutNames(GatedMLP):
    def forward(*args):
        self, x = args
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class ClippedSiLU(nn.Module):
    def forward(self, x):
        return F.silu(x.clamp(max=50))


class OfMatrices(nn.Module):
    def forward(self, x):
        return F.silu(x) + 0 * x[:, :1]


def test_a_forward_is_recognised_by_what_it_does():
    assert recognise(GatedMLP()) == Structure("w1", "w3", "w2", "silu", "act", "hidden_states")
    assert recognise(Swapped()) == Structure("w1", "w3", "w2", "silu", None, "x")
    assert recognise(GatedMLP(nn.GELU("tanh"))) == Structure("w1", "w3", "w2", "gelu_tanh", "act", "hidden_states")


OTHERS = [
    *(kind() for kind in (Scaled, Branching, Ungated, Squared, DropsInTraining, WithoutGradients, WithoutAutocast)),
    *(kind() for kind in (Checkpointed, Clipped, Counting, Keywords)),
    *(kind() for kind in (Flagged, OfConfig, OfModes, OfItsFunction, OfItsMethod, WithoutNames)),  # such at times
    *map(GatedMLP, (nn.GELU(), nn.ReLU(), nn.PReLU(), ClippedSiLU(), OfMatrices())),
]


@pytest.mark.parametrize("mlp", OTHERS, ids=lambda mlp: f"{type(mlp).__name__}-{mlp.act}")
@pytest.mark.parametrize("training", [True, False])
def test_anything_else_is_left_as_it_is(mlp, training):
    model = Holder(copy.deepcopy(mlp)).train(training)
    before = {name: copy.copy(value) for name, value in vars(model.mlp).items() if name[0] != "_"}
    report = replace_linear(model, r=2, lora_alpha=1.0)
    assert report.mlps == []
    assert not isinstance(model.mlp, LoRAMLP)
    assert type(unmix(model.mlp)) is type(mlp)
    assert {name: vars(model.mlp)[name] for name in before} == before


def test_an_activation_that_is_changed(as_one):
    model = Holder(GatedMLP(nn.GELU("tanh")))
    replace_linear(model, r=2, lora_alpha=1.0)
    x = torch.randn(3, 16)
    before = model(x)
    model.mlp.act.approximate = "none"
    assert model.mlp.why_not(x) == "its activation was changed"
    assert not torch.equal(model(x), before)
    assert len(as_one) == 1


def test_an_argument_of_another_name(as_one):
    model = Holder(GatedMLP())
    replace_linear(model, r=2, lora_alpha=1.0)
    x = torch.randn(3, 16)
    torch.testing.assert_close(model.mlp(hidden_states=x), model.mlp(x))
    with pytest.raises(TypeError, match="bogus"):
        model.mlp(bogus=x)
    assert len(as_one) == 2


def test_partial_replacements_and_later_calls_fuse_nothing_else():
    partial = Holder(GatedMLP())
    assert replace_linear(partial, r=2, lora_alpha=1.0, target_modules=["w1", "w3"]).mlps == []
    assert replace_linear(partial, r=2, lora_alpha=1.0, target_modules=["w2"]).mlps == []
    apart = nn.ModuleList([GatedMLP(), GatedMLP()])
    replace_linear(apart, r=2, lora_alpha=1.0, target_modules=r"0\..*", fuse="off")
    assert replace_linear(apart, r=2, lora_alpha=1.0, target_modules=r"1\..*").mlps == ["1"]


def test_attention_is_not_traced():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            raise AssertionError("it was called")

    model = Holder(Attention())
    assert replace_linear(model, r=2, lora_alpha=1.0).mlps == []


def test_errors_name_what_does_not_fit():
    def mlp(**sizes):
        module = GatedMLP()
        for name, (cols, rows) in {"w1": (16, 24), "w3": (16, 24), "w2": (24, 16), **sizes}.items():
            setattr(module, name, LoRALinear(cols, rows, r=2))
        return module

    for sizes, words in (
        ({"w3": (16, 20)}, r"gate and up must have weights of one shape, got \(24, 16\) and \(20, 16\)"),
        ({"w2": (20, 16)}, "down must have in_features 24, got 20"),
        ({"w3": (8, 24)}, "gate and up must have weights of one shape"),
    ):
        with pytest.raises(ValueError, match=words):
            LoRAMLP.fuse(mlp(**sizes))
    with pytest.raises(ValueError, match="gate, up and down must be LoRALinear"):
        LoRAMLP.fuse(GatedMLP())
    with pytest.raises(ValueError, match="the forward of Scaled is not"):
        LoRAMLP.fuse(Scaled())
    with pytest.raises(ValueError, match="save must be one of all, less, got 'some'"):
        LoRAMLP.fuse(mlp(), save="some")
