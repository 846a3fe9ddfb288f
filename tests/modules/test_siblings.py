"""Layers that are computed together: each gives what it gives alone, whatever its model's user does."""

import copy
import gc
import inspect
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_lora import explain, replace_linear
from fused_lora.modules import LoRALinear, siblings
from fused_lora.modules.mixins import unmix
from fused_lora.modules.siblings import LoRASiblings
from tests.modules.threads import at_once

DYNAMO = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")


class Attention(nn.Module):
    """The projections of one, called as a model's code calls them."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(24, 32), nn.Linear(24, 8, bias=False), nn.Linear(24, 8)

    def forward(self, x, other=None):
        read = x if other is None else other
        return torch.cat([self.q(x), self.k(read), self.v(read)], -1)


def make_pair(kind=Attention, dropout=0.0, **options):
    """The same model twice: its layers one by one, and together."""
    torch.manual_seed(0)
    alone = nn.ModuleDict({"attention": kind()})
    together = copy.deepcopy(alone)
    options = {"r": 4, "lora_alpha": 8, "lora_dropout": dropout} | options
    replace_linear(alone, **options, fuse="off")
    assert replace_linear(together, **options).groups
    for layer in alone.modules():
        if isinstance(layer, LoRALinear):
            layer.lora_B.data.normal_()
    together.load_state_dict(alone.state_dict())
    return alone["attention"], together["attention"]


def close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_together_they_give_what_they_give_alone(groups):
    alone, together = make_pair()
    x = torch.randn(5, 24, requires_grad=True)
    for _ in range(2):
        wanted, got = alone(x), together(x)
        close(got, wanted)
        dy = torch.randn_like(wanted)
        theirs = torch.autograd.grad(wanted, [x, *(p for p in alone.parameters() if p.requires_grad)], dy)
        ours = torch.autograd.grad(got, [x, *(p for p in together.parameters() if p.requires_grad)], dy)
        for one, other in zip(ours, theirs, strict=True):
            close(one, other)
    assert groups == [3, 3]


def test_cross_attention(groups):
    alone, together = make_pair()
    x, other = torch.randn(5, 24), torch.randn(5, 24)
    close(together(x, other), alone(x, other))
    close(together(x, other=x), alone(x, other=x))
    assert groups == [2, 2], "k and v"
    close(together(x, None), alone(x))
    assert groups == [2, 2, 3]


def test_one_called_by_itself_computes_no_other(groups):
    alone, together = make_pair()
    x = torch.randn(3, 24)
    for name in "qkv":
        close(getattr(together, name)(x), getattr(alone, name)(x))
    assert not groups


def test_nothing_outlives_the_call(groups):
    _, together = make_pair()
    kept = []

    class Watching(nn.Module):
        def forward(self, x):
            kept.append([weakref.ref(y) for _, y, *_ in siblings.thread.call.waiting])
            raise KeyError("in the middle")

    q = together.q
    together.k = Watching()
    with torch.no_grad(), pytest.raises(KeyError):
        together(torch.randn(3, 24))
    assert siblings.thread.call is None
    together.k = LoRALinear(24, 8, 4)
    q.register_forward_hook(lambda *_: None)
    for leave in (pickle.dumps, copy.deepcopy, copy.copy):
        leave(unmix(copy.copy(together)).k)
    gc.collect()
    assert all(ref() is None for refs in kept for ref in refs)


class Leaking(Attention):
    def forward(self, x, fails=False):
        q = self.q(x)
        if fails:
            raise KeyError("in the middle")
        return q.sum() + self.k(x).sum() + self.v(x).sum()


def test_a_call_that_fails_leaves_nothing(groups):
    alone, together = make_pair(Leaking)
    together.q.register_parameter("unused", None)
    x = torch.randn(3, 24)
    with pytest.raises(KeyError):
        together(x, True)
    assert siblings.thread.call is None
    close(together(x), alone(x))
    close(together.k(x), alone.k(x))


def test_threads(groups):
    alone, together = make_pair()
    xs = [torch.randn(4, 24) for _ in range(4)]
    wanted = [alone(x).detach() for x in xs]
    wrong, start = [], threading.Barrier(len(xs))

    def serve(x, y):
        start.wait()
        for _ in range(300):
            try:
                with torch.no_grad():
                    if not torch.allclose(together(x), y, atol=1e-5):
                        wrong.append("value")
            except Exception as error:
                wrong.append(error)

    at_once(serve, xs, wanted)
    assert not wrong
    assert len(groups) == 1200


def change(name):
    """What a user may do to a layer between or before forwards: (a function of the attention, groups that remain)."""

    def merged(attention):
        attention.k.merge_()

    def replaced(attention):
        attention.k = attention.k.to_linear()

    def subclass(attention):
        attention.k.__class__ = type("Own", (LoRALinear,), {"forward": lambda self, x: LoRALinear.forward(self, x)})

    def forward(attention):
        own = attention.k.forward
        attention.k.forward = lambda x: own(x)

    def hook(attention):
        attention.k.register_forward_pre_hook(lambda module, args: None)

    def evaluated(attention):
        attention.k.eval()

    def smaller(attention):
        attention.k.lora_dropout = 0.0

    def new_bias(attention):
        attention.v.bias = nn.Parameter(torch.ones(8))

    def data(attention):
        attention.k.lora_B.data = attention.k.lora_B.data * 2

    return locals()[name]


ALONE = ["merged", "replaced", "subclass", "forward", "hook"]


@pytest.mark.parametrize("name", [*ALONE, "new_bias", "data"])
def test_layers_that_are_called_themselves(name, groups):
    alone, together = make_pair()
    x = torch.randn(3, 24)
    close(together(x), alone(x))
    for model in (alone, together):
        change(name)(model)
    close(together(x), alone(x))
    assert groups == ([3] if name in ALONE else [3, 3])


@pytest.mark.parametrize("name", ["evaluated", "smaller"])
def test_dropout_of_its_own(name, groups):
    alone, together = make_pair(dropout=1.0)
    for model in (alone, together):
        change(name)(model)
    x = torch.randn(3, 24)
    close(together(x), alone(x))
    assert not groups


def test_hooks_of_all_modules(groups):
    _, together = make_pair()
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
    try:
        together(torch.randn(3, 24))
    finally:
        handle.remove()
    assert not groups


def test_modes_are_those_of_the_call(groups):
    alone, together = make_pair()
    x = torch.randn(3, 24)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.enable_grad()):
        with mode:
            got, wanted = together(x), alone(x)
        assert (got.dtype, got.requires_grad) == (wanted.dtype, wanted.requires_grad)
        torch.testing.assert_close(got, wanted, atol=2e-2, rtol=2e-2)


class HalfWithoutGrad(Attention):
    def forward(self, x):
        q = self.q(x)
        with torch.no_grad():
            k = self.k(x)
        return torch.cat([q, k, self.v(x)], -1)


def test_another_mode_in_the_middle(groups):
    alone, together = make_pair(HalfWithoutGrad)
    x = torch.randn(3, 24)
    for model in (alone, together):
        model(x).sum().backward()
    assert together.k.lora_A.grad is alone.k.lora_A.grad is None
    close(together.v.lora_A.grad, alone.v.lora_A.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_around_some(reentrant, groups):
    class Checkpointed(Attention):
        def forward(self, x):
            q, k = self.q(x), self.k(x)
            return torch.cat([q, k, checkpoint(self.v, x, use_reentrant=reentrant)], -1)

    alone, together = make_pair(Checkpointed)
    grads = []
    for model in (alone, together):
        x = torch.ones(3, 24, requires_grad=True)
        model(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*grads, strict=True):
        close(one, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_around_the_whole(reentrant, groups):
    alone, together = make_pair()
    grads = []
    for model in (alone, together):
        x = torch.ones(3, 24, requires_grad=True)
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*grads, strict=True):
        close(one, other)
    assert groups == [3, 3]


def test_a_class_that_got_another_forward(groups, monkeypatch):
    class Patched(Attention):
        pass

    Patched.forward = Attention.forward
    alone, together = make_pair(Patched)
    monkeypatch.setattr(Patched, "forward", lambda self, x: self.q(x) + 1)
    x = torch.randn(3, 24)
    close(together(x), alone(x))
    assert not groups


def test_copies_and_pickles(groups):
    alone, together = make_pair()
    x = torch.randn(3, 24)
    wanted = alone(x)
    for twin in (copy.copy(together), copy.deepcopy(together), pickle.loads(pickle.dumps(together))):
        assert type(twin) is type(together)
        close(twin(x), wanted)
    replica = together._replicate_for_data_parallel()
    replica._modules = {name: child._replicate_for_data_parallel() for name, child in together._modules.items()}
    for name, child in replica._modules.items():
        child._parameters = dict(getattr(together, name)._parameters)
    close(replica(x), wanted)
    assert groups == [3] * 4
    size = len(pickle.dumps(together.q))
    assert size < 2 * len(pickle.dumps(alone.q)), "of one layer alone"


class Locked(Attention):
    """With something that cannot be copied, and the means to copy it anyway."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


class Rebuilt(Attention):
    def __reduce__(self):
        return Attention, ()


def test_copies_in_a_way_of_the_class_itself(groups):
    _, together = make_pair(Locked)
    x = torch.randn(3, 24)
    wanted = together(x)
    for twin in (copy.deepcopy(together), pickle.loads(pickle.dumps(together))):
        assert twin.lock is not together.lock
        close(twin(x), wanted)
    assert groups == [3] * 3
    rebuilt = Rebuilt()
    assert replace_linear(nn.Sequential(rebuilt), r=2, lora_alpha=1.0).groups
    assert type(copy.deepcopy(rebuilt)) is Attention


def test_another_forward_of_the_class(groups, monkeypatch):
    """As libraries patch the classes of others."""
    alone, together = make_pair()

    def changes_x(self, x, other=None):
        q = self.q(x)
        return torch.cat([q, self.k(x.mul_(2)), self.v(x)], -1)

    monkeypatch.setattr(Attention, "forward", changes_x)
    with torch.inference_mode():
        close(together(torch.ones(3, 24)), alone(torch.ones(3, 24)))
    assert not groups


def test_exported_with_sizes_by_the_names_of_arguments(groups):
    alone, together = make_pair()
    sizes = {"x": {0: torch.export.Dim("rows", min=2, max=64)}, "other": None}
    program = torch.export.export(together, (torch.randn(5, 24), None), dynamic_shapes=sizes)
    x = torch.randn(7, 24)
    close(program.module()(x, None), alone(x))


def test_what_it_was_before(groups):
    _, together = make_pair()
    assert isinstance(together, Attention)
    assert type(together).__name__ == "Attention", "libraries find modules by it"
    assert list(inspect.signature(together.forward).parameters) == ["x", "other"]
    assert type(unmix(together)) is Attention
    assert not hasattr(together, "_reading")


@DYNAMO
@pytest.mark.parametrize("kind", [Attention, Leaking])
def test_compiled_in_one_graph(kind, groups):
    torch._dynamo.reset()
    alone, together = make_pair(kind)
    x = torch.randn(3, 24)
    compiled = torch.compile(together, fullgraph=True, backend="eager")
    for _ in range(2):
        close(compiled(x), alone(x))
    assert groups == [3, 3]
    assert siblings.thread.call is None


class Broken(Attention):
    def forward(self, x):
        q = self.q(x)
        torch._dynamo.graph_break()
        return torch.cat([q, self.k(x), self.v(x)], -1)


@DYNAMO
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_graph_that_breaks(groups):
    torch._dynamo.reset()
    alone, together = make_pair(Broken)
    compiled = torch.compile(together, backend="eager")
    for _ in range(3):
        x = torch.randn(3, 24)
        close(compiled(x), alone(x))
    assert siblings.thread.call is None


@DYNAMO
def test_a_layer_compiled_by_itself(groups):
    torch._dynamo.reset()
    alone, together = make_pair()
    x = torch.randn(3, 24)
    together.k.compile(backend="eager")
    for factor in (1.0, 2.0):
        for model in (alone, together):
            model.k.lora_B.data.mul_(factor)
        close(together(x), alone(x))
    assert not groups


def test_offload_by_accelerate(groups):
    accelerate = pytest.importorskip("accelerate")
    alone, together = make_pair()
    x = torch.randn(3, 24)
    wanted = alone(x)
    accelerate.cpu_offload(together, execution_device=torch.device("cpu"))
    close(together(x), wanted)
    assert not groups


def test_without_a_launch_for_it_they_are_alone():
    alone, together = make_pair()
    x = torch.randn(3, 24)
    close(together(x), alone(x))
    together.q.lora_A.requires_grad_(False)
    assert torch.equal(together(x), alone(x)), "the very same calls"


def test_replace_linear_finds_them():
    from fused_lora.pretrain.llama import Llama, LlamaConfig

    torch.manual_seed(0)
    model = Llama(LlamaConfig(16, 24, 2, 2, 40))
    tokens = torch.randint(40, (2, 7))
    twin = copy.deepcopy(model)
    targets = r".*\.(self_attn|mlp)\..*"
    report = replace_linear(model, 2, lora_alpha=1.0, target_modules=targets)
    apart = replace_linear(twin, 2, lora_alpha=1.0, target_modules=targets, fuse="off")
    assert (apart.groups, apart.mlps) == ([], [])
    names = [tuple(f"layers.{i}.self_attn.{name}_proj" for name in "qkv") for i in range(2)]
    assert report.groups == names
    assert report.mlps == ["layers.0.mlp", "layers.1.mlp"]
    assert f"  = {', '.join(names[0])}: together" in str(report)
    assert "  = layers.0.mlp: as one" in str(report)
    assert "one of 3 layers that are called with one x, computed one by one: no kernel for device cpu" in str(
        explain(model)
    )
    twin.load_state_dict(model.state_dict())
    close(model(tokens), twin(tokens))
    (model(tokens).sum() + twin(tokens).sum()).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.grad is theirs.grad is None or torch.allclose(ours.grad, theirs.grad, atol=1e-4)


def test_only_what_was_replaced_is_together():
    from fused_lora.pretrain.llama import Llama, LlamaConfig

    model = Llama(LlamaConfig(16, 24, 1, 2, 40))
    report = replace_linear(model, 2, lora_alpha=1.0, target_modules=["q_proj", "v_proj", "gate_proj", "up_proj"])
    assert report.groups == [
        ("layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"),
        ("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"),
    ]
    assert report.mlps == []
    assert isinstance(model.layers[0].self_attn, LoRASiblings)
    with pytest.raises(ValueError, match="fuse must be one of auto, off, got 'on'"):
        replace_linear(model, 2, lora_alpha=1.0, target_modules=["k_proj"], fuse="on")


class Told(Attention):
    """Between the calls of q and k something from elsewhere is called."""

    def forward(self, x):
        q = self.q(x)
        self.told[0]()
        return q.sum() + self.k(x).sum() + self.v(x).sum()


CHANGES = {
    "alpha": lambda k: setattr(k, "lora_alpha", 7.0),
    "a factor": lambda k: setattr(k, "lora_B", nn.Parameter(torch.ones_like(k.lora_B))),
    "a factor's values": lambda k: k.lora_B.detach().mul_(2),
    "a bias": lambda k: k.bias.detach().add_(1) if k.bias is not None else k.weight.detach().add_(1),
    "a state": lambda k: k.load_state_dict(
        {name: value + 1 for name, value in k.state_dict().items() if "lora" in name}, strict=False
    ),
    "dropout": lambda k: setattr(k, "lora_dropout", 1.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_changes_after_its_result_was_made(change, groups):
    torch.manual_seed(0)
    alone, together = make_pair(Told)
    x = torch.randn(3, 24)
    with torch.no_grad():
        for model in (alone, together):
            model.told = [lambda model=model: CHANGES[change](model.k)]
        close(together(x), alone(x))
    assert groups
