"""route() over whole models: which rows meet which adapter, now, in the backward pass and when computed again."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_lora import (
    LoRABank,
    adapter_parameters,
    add_adapter,
    delete_adapter,
    explain,
    merge_and_unload,
    ops,
    rename_adapter,
    replace_linear,
    route,
    set_adapter,
)  # fmt: skip
from fused_lora.modules import LoRAMLP, protocol, routing
from fused_lora.modules.siblings import LoRASiblings
from fused_lora.ops import lora_segments, lora_segments_mlp
from fused_lora.pretrain.llama import MLP, LlamaConfig
from tests.modules.blocks import Block

K = 24
DYNAMO = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")


class Model(nn.Module):
    def __init__(self, checkpoints=None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(K) for _ in range(2))
        self.head = nn.Linear(K, 5)
        self.checkpoints = checkpoints

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.checkpoints is None else checkpoint(block, x, **self.checkpoints)
        return self.head(x)


NAMES = ("a", "b", "c")


def make(checkpoints=None, **options):
    torch.manual_seed(0)
    model = Model(checkpoints).double()
    for i, name in enumerate(NAMES):
        targets = None if name != "c" else ["q", "out"]  # c is not in all banks
        add_adapter(model, name, 4 + 8 * i, 3.0 + i, target_modules=targets or ["q", "k", "v", "out"], **options)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.normal_(std=0.3)
    return model


def alone(model, name):
    """The model with one adapter and no banks; None: without any."""
    torch.manual_seed(0)
    single = Model().double()
    state = {key: value for key, value in model.state_dict().items() if "lora_" not in key}
    if name is None:
        single.load_state_dict(state)
        return single
    first = next(bank for bank in model.modules() if isinstance(bank, LoRABank) and name in bank.adapters)
    adapter = first.adapters[name]
    targets = [key for key, bank in model.named_modules() if isinstance(bank, LoRABank) and name in bank.adapters]
    replace_linear(single, adapter.r, adapter.lora_alpha, target_modules=targets)
    for key, value in model.state_dict().items():
        layer, _, rest = key.partition(".lora_")
        if rest[2:] == name and rest[:1] in "AB":
            state[f"{layer}.lora_{rest[0]}"] = value
    single.load_state_dict(state, strict=False)
    return single


def near(one, other, tolerance=1e-10):
    return (one - other).abs().max().item() <= tolerance * max(1, other.abs().max().item())


def batch(names, length=7, seed=1):
    torch.manual_seed(seed)
    return torch.randn(len(names), length, K, dtype=torch.float64)


def expected(model, names, x):
    return torch.stack(
        [alone(model, None if name == "__base__" else name)(each) for name, each in zip(names, x, strict=True)]
    )


def test_sums_of_adapters():
    """As the sum of what each adds."""
    model, x = make(), batch(("a", "b", "c"))
    names = [("a", "c"), "b", ("c", "b", "a")]
    linear, base = model.blocks[0].q, x @ model.blocks[0].q.weight.T + model.blocks[0].q.bias
    with route(linear, names):
        y = linear(x)
    added = {}
    for name in NAMES:
        with route(linear, name):
            added[name] = linear(x) - base
    want = [
        sum(added[name][i] for name in ((path,) if isinstance(path, str) else path)) for i, path in enumerate(names)
    ]
    assert near(y - base, torch.stack(want))


MIXED = ("b", "a", "a", "__base__", "c", "b")


def gradients(model, loss):
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values()), allow_unused=True), strict=True))


def gradients_alone(model, names, x):
    """Of each adapter, by the rows that are its."""
    found = {}
    for name in set(names) - {"__base__"}:
        single = alone(model, name)
        single(x[[i for i, each in enumerate(names) if each == name]]).square().sum().backward()
        for key, parameter in single.named_parameters():
            if "lora_" in key:
                found[f"{key}.{name}"] = parameter.grad
    return found


def assert_gradients(got, want):
    """Those of the adapters that were routed, and none of others."""
    for key, grad in got.items():
        if "lora_" not in key:
            continue
        if key in want:
            assert near(grad, want[key]), key
        else:
            assert grad is None, key


def test_sequences_in_any_order():
    model, x = make(), batch(MIXED)
    with route(model, MIXED):
        y = model(x)
    assert near(y, expected(model, MIXED, x))
    assert_gradients(gradients(model, y.square().sum()), gradients_alone(model, MIXED, x))


def test_rows_and_counts():
    model = make()
    x = batch(MIXED, 1)[:, 0]
    with route(model, MIXED):  # a name for each row
        assert near(model(x), expected(model, MIXED, x))
    names, counts = ["c", "__base__", "a", "b"], [2, 1, 0, 3]
    by_row = ["c", "c", "__base__", "b", "b", "b"]
    for rows in (counts, torch.tensor(counts)):
        with route(model, names, rows=rows):
            assert near(model(x), expected(model, by_row, x))
    with route(model, ["a"], rows=[4]):  # rows behind have no adapter
        assert near(model(x), expected(model, ["a"] * 4 + ["__base__"] * 2, x))
    with route(model, "b"):
        assert near(model(x), expected(model, ["b"] * 6, x))


def test_batches_of_several_lengths_under_one_route():
    """As generation has them: a prompt, then a token at a time."""
    model = make()
    with route(model, MIXED):
        for length in (7, 1, 1, 300):
            x = batch(MIXED, length)
            assert near(model(x), expected(model, MIXED, x))


def test_divide():
    model, x = make(), batch(MIXED, 1)[:, 0]
    routed = route(model, ["a", "__base__", "b"], rows=[1, 2, 3])
    for counts in ([1, 2, 3], [6, 0, 0], [0, 0, 6], [2, 0, 1]):
        routed.divide(counts)
        with routed:
            y = model(x)
        names = [name for name, count in zip(("a", "__base__", "b"), counts, strict=True) for _ in range(count)]
        assert near(y, expected(model, names + ["__base__"] * (6 - len(names)), x))


def test_the_backward_pass_has_the_routing_of_its_forward():
    model, x = make(), batch(MIXED)
    with route(model, MIXED):
        y = model(x)
    with route(model, "c"):
        model(x)
        got = gradients(model, y.square().sum())
    assert_gradients(got, gradients_alone(model, MIXED, x))


def test_a_division_that_changes_before_the_backward_pass_is_an_error():
    model, x = make(), batch(MIXED, 1)[:, 0]
    routed = route(model, ["a", "b"], rows=[3, 3])
    with routed:
        y = model(x)
    routed.divide([1, 5])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("inside", [None, "c"])
def test_a_checkpoint_computes_again_by_the_routing_of_its_forward(inside):
    """Also where the route is over by then, or another one is there."""
    model, x = make({"use_reentrant": False}), batch(MIXED).requires_grad_()
    with route(model, MIXED):
        y = model(x)
    if inside is None:
        got = gradients(model, y.square().sum())
    else:
        with route(model, inside):
            got = gradients(model, y.square().sum())
    assert_gradients(got, gradients_alone(model, MIXED, x.detach()))


def test_dropout_is_of_training_and_of_the_forward_pass_that_a_checkpoint_repeats():
    model, again = make(lora_dropout=0.5), make({"use_reentrant": False}, lora_dropout=0.5)
    results = []
    for each in (model, again):
        x = batch(("a", "c", "__base__")).requires_grad_()
        torch.manual_seed(5)
        with route(each, ["a", "c", "__base__"]):
            y = each(x)
        results.append([y, *torch.autograd.grad(y.sum(), [x, *adapter_parameters(each, "a")])])
    assert all(map(torch.equal, *results))
    with route(model, ["a", "c", "__base__"]):
        assert not torch.equal(model(x)[:2], results[0][0][:2])
        assert torch.equal(model(x)[2], results[0][0][2])
        model.eval()
        assert torch.equal(model(x), model(x))
        for bank in model.modules():
            if isinstance(bank, LoRABank):
                bank.set_lora_dropout("a", 0.0)
        kept = model(x)
        assert torch.equal(model.train()(x)[0], kept[0])


@pytest.mark.parametrize("change", ["set_lora_alpha", "set_lora_dropout"])
def test_a_checkpoint_does_not_compute_again_by_another_scale_or_dropout(change):
    model = make({"use_reentrant": False})
    x = batch(("a",)).requires_grad_()
    with route(model, "a"):
        y = model(x)
    getattr(model.blocks[1].q, change)("a", 0.3)
    with pytest.raises(RuntimeError, match="whose lora_alpha or lora_dropout has been set since"):
        y.sum().backward()


def test_two_checkpointed_passes_and_one_backward():
    model, x = make({"use_reentrant": False}), batch(MIXED).requires_grad_()
    others = ("a", "b", "b", "b", "b", "b")
    with route(model, MIXED):
        first = model(x).square().sum()
    with route(model, others):
        second = model(x).square().sum()
    got = gradients(model, first + second)
    want = [gradients_alone(model, names, x.detach()) for names in (MIXED, others)]
    summed = {key: sum(each[key] for each in want if key in each) for key in want[0] | want[1]}
    assert_gradients(got, summed)


def test_a_checkpoint_computes_again_in_another_thread():
    """As autograd does on a GPU."""
    model, x = make({"use_reentrant": False}), batch(MIXED).requires_grad_()
    with route(model, MIXED):
        y = model(x)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(gradients, model, y.square().sum()).result()
    assert_gradients(got, gradients_alone(model, MIXED, x.detach()))


def test_a_route_within_what_is_computed_again():
    model, x = make(), batch(MIXED).requires_grad_()

    def routed(x):
        with route(model, MIXED):
            return model(x)

    with route(model, "c"):
        y = checkpoint(routed, x, use_reentrant=False)
        got = gradients(model, y.square().sum())
    assert_gradients(got, gradients_alone(model, MIXED, x.detach()))


def test_a_checkpoint_with_reentry_is_an_error():
    model, x = make({"use_reentrant": True}), batch(MIXED).requires_grad_()
    with route(model, MIXED):
        y = model(x)
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            y.sum().backward()


def test_groups_are_computed_together(monkeypatch):
    model, x = make(), batch(MIXED)
    assert isinstance(model.blocks[0], LoRASiblings)
    calls = []
    counted = lambda x, parts: calls.append(len(parts)) or lora_segments(x, parts)  # noqa: E731
    monkeypatch.setattr(sys.modules["fused_lora.ops.lora_group"], "lora_segments", counted)
    with route(model, MIXED):
        assert near(model(x), expected(model, MIXED, x))
    assert calls == [3, 3]
    with route(model, "c"):  # which k and v do not have
        assert near(model(x), expected(model, ["c"] * 6, x))
    assert calls == [3, 3]


def test_gated_mlps_are_computed_as_one(monkeypatch):
    """Where something computes them so; and as they are without a route's adapters in one of the layers."""
    torch.manual_seed(0)
    mlp, x = MLP(LlamaConfig(K, 40, 1, 2)).double(), batch(MIXED)
    for i, name in enumerate(NAMES):
        add_adapter(mlp, name, 4 + 8 * i, 3.0 + i, target_modules=["up_proj"] if name == "c" else "all-linear")
    for parameter in mlp.parameters():
        with torch.no_grad():
            parameter.normal_(std=0.3)
    assert isinstance(mlp, LoRAMLP)
    parameters = [parameter for name in ("a", "b") for parameter in adapter_parameters(mlp, name)]

    def results(names):
        with route(mlp, names):
            y = mlp(x)
        return [y, *torch.autograd.grad(y.square().sum(), parameters, allow_unused=True, materialize_grads=True)]

    assert "no kernel" in mlp.why_not(x) or "within `with route" in mlp.why_not(x)
    want, of_one = results(MIXED), results("c")
    calls = []
    counted = lambda x, *layers, **options: calls.append(options) or lora_segments_mlp(x, *layers, **options)  # noqa: E731
    monkeypatch.setattr(protocol, "mlp_obstacle", lambda device, dtype, routed: None)
    monkeypatch.setattr(protocol, "obstacle_of_banks", lambda device, dtype, drops: None)
    monkeypatch.setattr(ops, "lora_segments_mlp", counted)
    assert all(map(near, results(MIXED), want))
    assert calls == [{"activation": "silu", "save": "all"}]
    assert all(map(near, results("c"), of_one))
    assert len(calls) == 1


def test_threads_have_their_own_routes():
    model, x = make(), batch(MIXED)
    wants = {name: expected(model, [name] * 6, x) for name in NAMES}
    barrier = threading.Barrier(3)

    def run(name):
        for _ in range(20):
            with route(model, name):
                barrier.wait()
                assert near(model(x), wants[name])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, NAMES))


def test_models_have_their_own_routes():
    one, other, x = make(), make(), batch(MIXED)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    with route(one, "a"), route(other, "b"):
        assert near(one(x), expected(one, ["a"] * 6, x))
        assert near(other(x), expected(other, ["b"] * 6, x))
        with route(one, "b"):
            assert near(one(x), expected(one, ["b"] * 6, x))
        assert near(one(x), expected(one, ["a"] * 6, x))


def test_a_route_ends_with_an_error_too():
    model, x = make(), batch(MIXED)
    with pytest.raises(ZeroDivisionError), route(model, "a"):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="within `with route"):
        model(x)


def test_names_that_changed_since():
    """Never another adapter's result: also where a name is there again."""
    model, x = make(), batch(MIXED)
    routed, other = route(model, "b"), route(model, "a")
    rename_adapter(model, "b", "e")
    with pytest.raises(RuntimeError, match="deleted, renamed or added since the route was made"), routed:
        model(x)
    with route(model, "e"):
        model(x)
    delete_adapter(model, "c")
    rename_adapter(model, "e", "b")
    with routed:  # the same adapter
        model(x)
    delete_adapter(model, "b")
    add_adapter(model, "b", 4, 4.0, target_modules=["q", "k", "v", "out"])
    with pytest.raises(RuntimeError, match="deleted, renamed or added since"), routed:
        model(x)
    with other:  # nothing of it has changed
        model(x)


def test_adapters_that_come_into_layers_without_them():
    model, x = make(), batch(MIXED)
    routed = route(model, "c")
    model.blocks[0].k.add_adapter("c", 4)
    with pytest.raises(RuntimeError, match="deleted, renamed or added since"), routed:
        model(x)


def test_set_adapter():
    model, x = make(), batch(MIXED)
    set_adapter(model, "b")
    assert near(model(x), expected(model, ["b"] * 6, x))
    with route(model, "a"):
        assert near(model(x), expected(model, ["a"] * 6, x))
    with pytest.raises(RuntimeError, match="within `with route"):
        copy.deepcopy(model)(x)
    set_adapter(model, "__base__")
    assert near(model(x), expected(model, ["__base__"] * 6, x))
    with pytest.raises(ValueError, match="got 'z'"):
        set_adapter(model, "z")
    set_adapter(model, None)
    with pytest.raises(RuntimeError, match="within `with route"):
        model(x)


def test_set_adapter_and_a_checkpoint():
    model, x = make({"use_reentrant": False}), batch(MIXED).requires_grad_()
    set_adapter(model, "b")
    y = model(x)
    set_adapter(model, "a")
    assert_gradients(gradients(model, y.square().sum()), gradients_alone(model, ["b"] * 6, x.detach()))


def test_adapters_may_come_while_a_route_is_there():
    model, x = make(), batch(MIXED)
    want = expected(model, MIXED, x)
    with route(model, MIXED):
        for i in range(20):
            add_adapter(model, f"more{i}", 64, 1.0, target_modules=["q", "k", "v", "out"])
        assert near(model(x), want)


@DYNAMO
@pytest.mark.parametrize("fuse", ["auto", "off"])
def test_one_program_for_every_division(fuse):
    torch._dynamo.reset()
    model, x = make(fuse=fuse), batch(MIXED, 1)[:, 0]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    routed = route(model, ["a", "__base__", "b"], rows=[1, 2, 3])
    for counts in ([1, 2, 3], [3, 0, 3], [0, 6, 0]):
        routed.divide(counts)
        names = [name for name, count in zip(("a", "__base__", "b"), counts, strict=True) for _ in range(count)]
        with routed:
            y = compiled(x)
        assert near(y, expected(model, names, x))
        want = gradients_alone(model, names, x)
        for key, grad in gradients(model, y.square().sum()).items():
            if key in want:
                assert near(grad, want[key])
    assert counter.frame_count == 1


@DYNAMO
def test_compiled_programs_see_what_changes():
    torch._dynamo.reset()
    model, x = make(), batch(MIXED)
    compiled = torch.compile(model, backend="aot_eager")
    for name in ("a", "b"):
        with route(model, name):
            assert near(compiled(x), expected(model, [name] * 6, x))
    with torch.no_grad():
        for parameter in adapter_parameters(model, "a"):
            parameter.mul_(0.5)
    for bank in model.modules():
        if isinstance(bank, LoRABank):
            bank.set_lora_alpha("a", 1.0)
    with route(model, "a"):
        assert near(compiled(x), expected(model, ["a"] * 6, x))


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda model: route(model, ["a", "z"]), ValueError, "names must be adapters of the model or '__base__', got 'z'"),
    (lambda model: route(model, [3]), TypeError, "names must be a str, got int"),
    (lambda model: route(nn.Linear(2, 2), "a"), ValueError, "model must have a LoRABank, got none"),
    (lambda model: route(model, ["a", "b"], rows=[1]), ValueError, "rows must be 2 ints"),
    (lambda model: route(model, [("a", "b", "a")]), ValueError, "names must not have one twice for the same rows"),
    (lambda model: route(model, ["a"], rows=[-1]), ValueError, "rows must be ints of at least 0"),
    (lambda model: route(model, ["a"], rows=torch.tensor([1.0])), ValueError, "rows must be 1 ints"),
    (lambda model: route(model, ["a"]).divide([1]), ValueError, "rows can change where"),
    (lambda model: add_adapter(model, "a", 4, 4.0, target_modules=["q"]), ValueError, "name must be new, got 'a'"),
    (lambda model: add_adapter(model, "e", 4, 4.0, target_modules=["w"]), ValueError, "no nn.Linear that can be"),
    (lambda model: add_adapter(model, "e", 400, 4.0, target_modules=["q"]), ValueError, "r must be at most 256"),
    (lambda model: add_adapter(model, "e", 4, config={"r": 3}), ValueError, "give config or r, not both"),
    (lambda model: add_adapter(model, "e", config={"r": 3, "target_modules": ["q"], "use_dora": True}), ValueError,
     "what banks do not serve: use_dora=True"),
    (lambda model: add_adapter(model, "e", 4, 4.0, ["q"], lora_dropout=1.5), ValueError, "lora_dropout must be"),
    (lambda model: add_adapter(model, "e", config={}, lora_dropout=0.1), ValueError, "give config or lora_dropout"),
    (lambda model: delete_adapter(model, "z"), ValueError, r"adapter of the model \(a, b, c\), got 'z'"),
    (lambda model: rename_adapter(model, "a", "c"), ValueError, "name must be new, got 'c'"),
    (lambda model: replace_linear(model, 4, 4.0, target_modules=["q"]), ValueError, "a LoRABank already"),
])  # fmt: skip
def test_errors(call, error, words):
    model, x = make(), batch(MIXED)
    with route(model, MIXED):
        before = model(x)
    with pytest.raises(error, match=words):
        call(model)
    with route(model, MIXED):
        assert torch.equal(model(x), before)


def test_shares_that_do_not_divide():
    model = make()
    with route(model, MIXED), pytest.raises(ValueError, match="x's 8 rows cannot be shared equally by 6 names"):
        model(torch.zeros(8, K, dtype=torch.float64))


def test_adapters_of_their_own_layers_and_ranks():
    torch.manual_seed(0)
    model = Model()
    report = add_adapter(model, "a", 4, 4.0, target_modules=["q", "v"], rank_pattern={"v": 9})
    assert report.adapted == [f"blocks.{i}.{name}" for i in range(2) for name in "qv"]
    report = add_adapter(model, "b", config={"r": 3, "lora_alpha": 6, "target_modules": ["v", "out"]})
    assert report.adapted == [f"blocks.{i}.{name}" for i in range(2) for name in ("v", "out")]
    assert report.replaced == [f"blocks.{i}.out" for i in range(2)]
    assert "an adapter more in 4 linear layers" in str(report)
    block = model.blocks[0]
    assert {name: adapter.r for name, adapter in block.v.adapters.items()} == {"a": 9, "b": 3}
    assert block.v.adapters["b"].scaling == 2.0
    assert sorted(block.q.adapters) == ["a"]
    assert type(block.k) is nn.Linear
    assert len(adapter_parameters(model, "b")) == 8


def test_none_or_all_banks_get_an_adapter(monkeypatch):
    model = make()
    real, calls = LoRABank.add_adapter, []

    def fails(self, *args):
        calls.append(self)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        real(self, *args)

    monkeypatch.setattr(LoRABank, "add_adapter", fails)
    with pytest.raises(torch.OutOfMemoryError):
        add_adapter(model, "e", 4, 4.0, target_modules=["q", "k", "v", "out"])
    assert not any("e" in bank.adapters for bank in model.modules() if isinstance(bank, LoRABank))


def test_what_is_said_of_banks():
    """What computes them, and that nothing merges or saves one adapter of several by guess."""
    model = make()
    text = str(explain(model, tokens=64))
    assert text.count("reference (3 adapters: no kernel for device cpu)") == 2  # q, out
    assert text.count("2 adapters: no kernel for device cpu") == 1  # k and v
    with pytest.raises(ValueError, match="LoRABank layers, whose rows may have several adapters"):
        merge_and_unload(model)


def test_banks_of_very_different_ranks():
    """A window as wide as the largest adapter's place, in banks whose slabs are smaller."""
    torch.manual_seed(0)
    model, x = Model().double(), batch(("a", "b"))
    add_adapter(model, "a", 4, 4.0, target_modules=["q", "out"], rank_pattern={"out": 200})
    add_adapter(model, "b", 5, 4.0, target_modules=["q", "out"])
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.normal_(std=0.3)
    with route(model, ("a", "b")):
        y = model(x)
        y.sum().backward()
    delete_adapter(model, "a")
    with route(model, "b"):
        assert near(model(x)[1], y[1])


def test_freeze_leaves_adapters():
    torch.manual_seed(0)
    model = Model()
    add_adapter(model, "a", 4, 4.0, target_modules=["q", "v"])
    report = add_adapter(model, "b", 4, 4.0, target_modules=["q"], freeze=True)
    assert "outside the updates" not in str(report)
    replace_linear(model, 2, 2.0, target_modules=["out"], freeze=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    assert {"blocks.0.q.lora_A.a", "blocks.0.q.lora_B.b", "blocks.1.v.lora_A.a", "blocks.1.out.lora_A"} <= trained


@DYNAMO
def test_compiled_programs_know_stale_routes():
    """Also where the names are there again, and where they changed hands."""
    torch._dynamo.reset()
    model, x = make(fuse="off"), batch(MIXED)
    compiled = torch.compile(model, backend="aot_eager")
    routed = route(model, "a")
    with routed, torch.no_grad():
        compiled(x)
    for old, new in (("a", "t"), ("b", "a"), ("t", "b")):
        rename_adapter(model, old, new)
    with pytest.raises(RuntimeError, match="deleted, renamed or added since"), routed:
        compiled(x)
    set_adapter(model, "a")
    with torch.no_grad():
        assert near(compiled(x), expected(model, ["a"] * 6, x))
    for old, new in (("a", "t"), ("b", "a"), ("t", "b")):
        rename_adapter(model, old, new)
    with pytest.raises(RuntimeError, match="deleted, renamed or added since"), torch.no_grad():
        compiled(x)


@DYNAMO
def test_compiled_programs_see_factors_that_moved():
    torch._dynamo.reset()
    model, x = make(fuse="off"), batch(MIXED)
    compiled = torch.compile(model, backend="aot_eager")
    with route(model, "a"), torch.no_grad():
        compiled(x)
    model.load_state_dict({key: torch.randn_like(value) for key, value in model.state_dict().items()}, assign=True)
    with route(model, "a"), torch.no_grad():
        assert near(compiled(x), expected(model, ["a"] * 6, x))
    for factor in adapter_parameters(model, "a"):
        factor.data = torch.randn_like(factor)
    with route(model, "a"), torch.no_grad():
        assert near(compiled(x), expected(model, ["a"] * 6, x))


def test_two_routes_in_one_checkpoint():
    model, x = make(), batch(MIXED).requires_grad_()
    inner = nn.ModuleList([model.blocks[0].q])
    with route(model, "a"), route(inner, "b"):
        y = checkpoint(model, x, use_reentrant=False)
        want = gradients(model, model(x).square().sum())
    got = gradients(model, y.square().sum())
    for key, grad in want.items():
        assert (grad is None) == (got[key] is None)
        assert grad is None or near(got[key], grad)


def test_a_division_that_changes_before_a_checkpoint_computes_again_is_an_error():
    model, x = make(), batch(MIXED, 1)[:, 0].requires_grad_()
    routed = route(model, ["a", "b"], rows=[3, 3])
    with routed:
        y = checkpoint(model, x, use_reentrant=False)
    routed.divide([1, 5])
    with pytest.raises(RuntimeError, match="divided the rows anew since"):
        y.sum().backward()


def test_a_bank_that_comes_after_the_route_takes_no_default():
    model, x = make(), batch(MIXED)
    routed = route(model, "a")
    add_adapter(model, "late", 4, 4.0, target_modules=["head"])
    set_adapter(model, "late")
    with pytest.raises(RuntimeError, match="added since the route was made"), routed:
        model(x)


def test_routes_that_end_out_of_order():
    model, x = make(), batch(MIXED)

    def steps(name):
        with route(model, name):
            yield model(x)

    first, second = steps("a"), steps("b")
    next(first)
    next(second)
    assert next(first, None) is None
    second.close()
    with pytest.raises(RuntimeError, match="within `with route"):
        model(x)


def test_what_functional_call_lends_leaves_the_parameters_alone():
    model, x = make(), batch(MIXED)
    before = copy.deepcopy(model.state_dict())
    lent = {name: torch.randn_like(factor) for name, factor in model.named_parameters() if name.endswith(".a")}
    twin = copy.deepcopy(model)
    twin.load_state_dict(lent, strict=False)
    with route(model, "a"):
        y = torch.func.functional_call(model, lent, (x,))
    assert near(y, expected(twin, ["a"] * 6, x))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    grads = torch.func.grad(lambda lent: torch.func.functional_call(model, lent, (x,)).square().sum())
    with route(model, "a"):
        found = grads(lent)
    want = gradients_alone(twin, ["a"] * 6, x)
    assert all(near(found[key], want[key]) for key in want)


def test_memory_that_somebody_else_holds_keeps_its_values():
    """A state dict whose place another one took; and values that are swapped in for a while."""
    model, x = make(), batch(MIXED)
    held = model.state_dict()
    values = {key: value.clone() for key, value in held.items()}
    model.load_state_dict({key: torch.randn_like(value) for key, value in held.items()}, assign=True)
    with route(model, "a"):
        model(x)
    assert all(torch.equal(held[key], values[key]) for key in held)
    factors = adapter_parameters(model, "b")
    own, values = [factor.data for factor in factors], [factor.clone() for factor in factors]
    for factor in factors:
        factor.data = torch.zeros_like(factor)
    with route(model, "b"):
        model(x)
    assert all(map(torch.equal, own, values))


def test_changes_of_others_before_a_backward_pass():
    model, x = make(), batch(MIXED)
    with route(model, "a"):
        y = model(x)
    for bank in filter(lambda module: isinstance(module, LoRABank), model.modules()):
        bank.set_lora_alpha("a", 77.0)
        bank.set_lora_alpha("b", 77.0)
    add_adapter(model, "z", 4, 4.0, target_modules=["q"])
    got = gradients(model, y.square().sum())
    for bank in filter(lambda module: isinstance(module, LoRABank), model.modules()):
        bank.set_lora_alpha("a", 3.0)
    assert_gradients(got, gradients_alone(model, ["a"] * 6, x))


def test_inference_and_then_training():
    model, x = make(), batch(MIXED)
    set_adapter(model, "a")
    with torch.inference_mode():
        model(x)
        add_adapter(model, "z", 64, 4.0, target_modules=["q"])
    model(x).sum().backward()


def test_a_weight_that_requires_gradients_is_an_error():
    model, x = make(), batch(MIXED)
    model.blocks[0].out.weight.requires_grad_(True)
    with route(model, "a"), pytest.raises(ValueError, match="weight must be frozen"):
        model(x)


def test_siblings_with_windows_of_several_sizes():
    model, x = make(), batch(MIXED)
    add_adapter(model, "wide", 200, 2.0, target_modules=["k"])
    set_adapter(model, "a")
    set_adapter(nn.ModuleList([model.blocks[0].k, model.blocks[1].k]), "wide")
    assert model(x).isfinite().all()


def test_an_empty_bank_moves_with_its_model():
    bank = LoRABank(4, 4)
    bank.add_adapter("a", 2)
    bank.delete_adapter("a")
    bank.to(torch.bfloat16)
    bank.add_adapter("b", 2)
    assert bank.factors("b")[0].dtype is torch.bfloat16


@pytest.mark.parametrize(("names", "rows", "error", "words"), [
    ([], None, ValueError, "names must have at least one entry"),
    (None, None, TypeError, "names must be a str, a list or a tuple, got NoneType"),
    (["a", "b"], torch.tensor([3, -1]), ValueError, "rows must be ints of at least 0"),
])  # fmt: skip
def test_names_that_are_none(names, rows, error, words):
    with pytest.raises(error, match=words):
        route(make(), names, rows)


@pytest.mark.parametrize("of", [list, torch.tensor])
def test_rows_on_the_host_that_are_too_many(of):
    model = make()
    routed = route(model, ["a", "b"], rows=of([3, 3]))
    with routed, pytest.raises(ValueError, match="rows must add up to x's 5 rows at most, got 6"):
        model(torch.zeros(5, K, dtype=torch.float64))
    routed.divide(of([3, 2]))
    with routed:
        assert len(model(torch.zeros(5, K, dtype=torch.float64))) == 5


@pytest.mark.parametrize("rows", [[3], [3, -1], torch.tensor([1, 2, 3])])
def test_a_division_that_is_none_leaves_the_route(rows):
    model, x = make({"use_reentrant": False}), torch.randn(1, 6, K, dtype=torch.float64, requires_grad=True)
    with route(model, ["a", "b"], rows=[3, 3]) as routed:
        y = model(x)
        with pytest.raises(ValueError, match="rows must be"):
            routed.divide(rows)
    y.sum().backward()  # the checkpoint computes again
    assert x.grad is not None


def test_a_route_keeps_few_sizes():
    model = make()
    routed = route(model, NAMES)
    with torch.no_grad(), routed:
        for length in range(1, 200):
            model(torch.zeros(3, length, K, dtype=torch.float64))
    assert len(routed._tables) <= routing.MOST_SIZES


def test_rows_are_no_truths():
    with pytest.raises(ValueError, match="rows must be ints"):
        route(make(), NAMES, rows=torch.tensor([True, True, False]))


@torch.no_grad()
def test_names_are_of_whole_sequences():
    """Rows that could be shared equally would change their adapter within a sequence."""
    model, x = make(), torch.zeros(4, 12, K, dtype=torch.float64)
    for count in (3, 8, 6, 16):
        with route(model, ["a"] * count), pytest.raises(ValueError, match=f"4 sequences or 48 rows, got {count}"):
            model(x)
    for count in (1, 2, 4, 48):
        with route(model, ["a"] * count):
            model(x)


@torch.no_grad()
def test_more_rows_than_there_are():
    model, x = make(), torch.zeros(4, 12, K, dtype=torch.float64)
    routed = route(model, ["a", "b"], rows=[48, 12])
    with routed, pytest.raises(ValueError, match="at most, got 60"):
        model(x)
    routed.divide([20, 12])
    with routed:
        model(x)
