"""What of a linear stands in the way of its replacement: it is left as it is, and the report says why."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fused_lora import LoRALinear, replace_linear

OPTIONS = dict(r=4, lora_alpha=6.0)


class SubLinear(nn.Linear):
    pass


class Wrapper(torch.Tensor):
    """A weight that is made of other tensors, as quantised and sharded ones are."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values)
        raise NotImplementedError(function)


class PlainSubclass(nn.Parameter):
    pass


def changed(change, *arguments):
    """A linear after a change of it."""
    linear = nn.Linear(4, 4)
    change(linear, *arguments)
    return linear


def with_weight(values, cls=nn.Parameter):
    return changed(setattr, "weight", cls(values, requires_grad=values.is_floating_point()))


def without_parameter():
    linear = changed(delattr, "weight")
    linear.weight = torch.zeros(4, 4)
    return linear


def nothing(*arguments):
    pass


HOOKS = {
    "forward": lambda linear: linear.register_forward_hook(nothing),
    "forward pre": lambda linear: linear.register_forward_pre_hook(nothing),
    "backward": lambda linear: linear.register_full_backward_hook(nothing),
    "backward pre": lambda linear: linear.register_full_backward_pre_hook(nothing),
    "state_dict": lambda linear: linear.register_state_dict_post_hook(nothing),
    "state_dict pre": lambda linear: linear.register_state_dict_pre_hook(nothing),
    "load_state_dict": lambda linear: linear.register_load_state_dict_post_hook(nothing),
    "load_state_dict pre": lambda linear: linear.register_load_state_dict_pre_hook(nothing),
    "pruning's": lambda linear: prune.random_unstructured(linear, "weight", 0.5),
}
# How to make a linear that must be left, and the reason.
ODD = {
    "subclass": (lambda: SubLinear(4, 4), "a subclass of nn.Linear (SubLinear)"),
    "lazy": (lambda: nn.LazyLinear(4), "a subclass of nn.Linear (LazyLinear)"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "(ParametrizedLinear)"),
    "int8": (lambda: with_weight(torch.zeros(4, 4, dtype=torch.int8)), "torch.int8"),
    "fp8": (lambda: with_weight(torch.zeros(4, 4, dtype=torch.float8_e4m3fn)), "torch.float8_e4m3fn"),
    "wrapper": (lambda: with_weight(Wrapper(torch.ones(4, 4))), "its weight is a Wrapper"),
    "parameter's subclass": (lambda: with_weight(torch.ones(4, 4), PlainSubclass), "its weight is a PlainSubclass"),
    "sparse": (lambda: with_weight(torch.eye(4).to_sparse()), "the layout torch.sparse_coo"),
    "gathered later": (lambda: with_weight(torch.empty(0)), "its weight has the shape (0,)"),
    "no parameter": (without_parameter, "its weight is a Tensor"),
    "buffer": (lambda: changed(nn.Module.register_buffer, "mask", torch.ones(4)), "it holds mask"),
    "child": (lambda: changed(nn.Module.add_module, "after", nn.ReLU()), "it holds after"),
    "forward": (lambda: changed(setattr, "forward", torch.relu), "its forward was replaced"),
    "extra_repr": (lambda: changed(setattr, "extra_repr", str), "its extra_repr was replaced"),
    "bias": (lambda: changed(setattr, "bias", nn.Parameter(torch.ones(1))), "its bias has the shape"),
    **{f"{name} hook": (partial(changed, register), "it has hooks") for name, register in HOOKS.items()},
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("what", ODD)
def test_what_is_left_alone_and_why(what):
    make, reason = ODD[what]
    odd = make()
    model = nn.ModuleDict({"odd": odd})
    before = [*odd.named_parameters()]
    with pytest.raises(ValueError, match=r"no nn\.Linear that can be replaced") as error:
        replace_linear(model, **OPTIONS)
    assert reason in str(error.value)
    model["plain"] = nn.Linear(4, 4)
    report = replace_linear(model, **OPTIONS)
    assert report.replaced == ["plain"]
    assert list(report.skipped) == ["odd"]
    assert reason in report.skipped["odd"]
    assert model["odd"] is odd
    for (name, old), (new_name, new) in zip(before, odd.named_parameters(), strict=True):
        assert (name, id(old), old.requires_grad) == (new_name, id(new), new.requires_grad)


def ties():
    """Two modules that share memory, the linear first, and whether it must be left alone."""
    linear, embedding = nn.Linear(4, 9, bias=False), nn.Embedding(9, 4)
    linear.weight = embedding.weight
    yield "parameter", linear, embedding, True
    linear, embedding = nn.Linear(4, 9, bias=False), nn.Embedding(9, 4)
    linear.weight = nn.Parameter(embedding.weight.data)
    yield "storage", linear, embedding, True
    linear, embedding = nn.Linear(4, 9, bias=False, device="meta"), nn.Embedding(9, 4, device="meta")
    linear.weight = nn.Parameter(embedding.weight.data)
    yield "storage on meta", linear, embedding, True
    linear, holder = nn.Linear(4, 9), nn.Module()
    holder.register_buffer("copy", linear.weight.data[2:3])
    yield "a row in a buffer", linear, holder, True
    linear, other = nn.Linear(4, 9), nn.Linear(4, 9)
    linear.bias = other.bias
    yield "bias", linear, other, True
    linear, other = nn.Linear(4, 9), nn.Linear(4, 9)
    whole = torch.randn(18, 4)
    linear.weight, other.weight = nn.Parameter(whole[:9]), nn.Parameter(whole[9:])
    yield "halves of one tensor", linear, other, False
    yield "meta, apart", nn.Linear(4, 9, device="meta"), nn.Linear(4, 9, device="meta"), False


@pytest.mark.parametrize("what", [name for name, *_ in ties()])
def test_ties(what):
    _, linear, other, tied = next(tie for tie in ties() if tie[0] == what)
    model = nn.ModuleDict({"linear": linear, "other": other, "plain": nn.Linear(4, 4)})
    report = replace_linear(model, target_modules=["linear", "plain"], **OPTIONS)
    assert ("linear" in report.skipped) == tied
    if tied:
        assert "is shared with other" in report.skipped["linear"]
        assert model["linear"] is linear


def test_merging_leaves_what_is_tied_by_storage():
    """Halves of one tensor are layers of their own, a view of an embedding is not."""
    whole, embedding = torch.randn(18, 4), nn.Embedding(9, 4)
    model = nn.ModuleDict({name: nn.Linear(4, 9, bias=False) for name in ("first", "second", "tied")})
    model["first"].weight, model["second"].weight = nn.Parameter(whole[:9]), nn.Parameter(whole[9:])
    model["tied"].weight = nn.Parameter(embedding.weight.data)
    model["embedding"] = embedding
    kept = [tensor.clone() for tensor in (model["second"].weight, embedding.weight)]
    report = replace_linear(model, **OPTIONS)
    assert report.replaced == ["first", "second"]
    nn.init.normal_(model["first"].lora_B)
    model["first"].merge_()
    assert not torch.equal(whole[:9], model["second"].weight)
    for before, after in zip(kept, (model["second"].weight, embedding.weight), strict=True):
        assert torch.equal(before, after)


def test_from_linear_refuses_a_subclass():
    """Its owner may not call it: nn.MultiheadAttention reads out_proj's weight."""
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(TypeError, match=r"^linear must be an nn\.Linear itself, got NonDynamicallyQuantizableLinear"):
        LoRALinear.from_linear(attention.out_proj, 4)
    with pytest.raises(TypeError, match=r"^linear\.weight must be a plain nn\.Parameter, got Wrapper"):
        LoRALinear.from_linear(with_weight(Wrapper(torch.ones(4, 4))), 4)
