"""AdapterTree against sums of matrices."""

import copy
import json

import peft
import pytest
import torch

from fused_lora import AdapterTree, LoRABank, add_adapter, load_adapter
from tests.adapters.models import net, x_of
from tests.test_whole_files import found_by_kills

NODES = {"root": (None, 4, 8.0), "left": ("root", 8, 4.0), "right": ("root", 3, 9.0), "deep": ("left", 16, 20.0)}


def make(dtype=torch.float64):
    tree = AdapterTree(net(dtype))
    for name, (parent, r, lora_alpha) in NODES.items():
        targets = ["up", "down", "out"] if name != "deep" else ["up"]  # a node may be in some layers only
        tree.add(name, parent, r=r, lora_alpha=lora_alpha, target_modules=targets)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in tree.model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return tree


def dense(tree, name):
    """The model with W + the sum of the deltas on a path, by plain products."""
    model, twin = tree.model, net(torch.float64)
    for layer, bank in model.named_modules():
        if isinstance(bank, LoRABank):
            linear = twin.get_submodule(layer)
            linear.weight.data = bank.weight.double().clone()
            for node in tree.path(name) if name else ():
                if node in bank.adapters:
                    A, B = bank.factors(node)
                    linear.weight.data += bank.adapters[node].scaling * (B.double() @ A.double())
    return twin


def near(one, other, tolerance=1e-10):
    return (one - other).abs().max().item() <= tolerance * max(1, other.abs().max().item())


@torch.no_grad()
def at(tree, name, x):
    with tree.route(name):
        return tree.model(x)


@torch.no_grad()
def assert_is(tree, wants):
    """wants: of nodes, what they computed before."""
    x = x_of(torch.float64)
    for name, want in wants.items():
        assert near(at(tree, name, x), want), name
        assert near(at(tree, name, x), dense(tree, name)(x)), name


@torch.no_grad()
def values(tree):
    return {name: at(tree, name, x_of(torch.float64)) for name in tree._parents}


def test_a_node_is_the_sum_of_its_path():
    tree = make()
    assert_is(tree, values(tree))
    assert near(at(tree, "__base__", x_of(torch.float64)), dense(tree, None)(x_of(torch.float64)))


@torch.no_grad()
def test_rows_at_different_nodes():
    tree, names = make(), ["deep", "root", "__base__", "right", "left", "deep"]
    x = torch.randn(6, 4, 9, dtype=torch.float64)
    with tree.route(names):
        y = tree.model(x)
    for i, name in enumerate(names):
        assert near(y[i], dense(tree, None if name == "__base__" else name)(x[i]))


def test_a_child_trains_and_its_ancestors_do_not():
    tree = make()
    before = copy.deepcopy(tree.model.state_dict())
    optimizer = torch.optim.AdamW(tree.train("left"), lr=0.1, weight_decay=0.1)
    with tree.route("left"):
        tree.model(x_of(torch.float64)).square().sum().backward()
    optimizer.step()
    for name, value in tree.model.state_dict().items():
        assert torch.equal(value, before[name]) == (".left" not in name), name
    want = dense(tree, "deep")(x_of(torch.float64))
    assert near(at(tree, "deep", x_of(torch.float64)), want)


def test_a_thousand_switches_leave_the_weights_bit_for_bit():
    tree, x = make(torch.bfloat16), x_of(torch.bfloat16)
    weights = {name: value.clone() for name, value in tree.model.state_dict().items()}
    nodes = [*NODES, "__base__"]
    first = {}
    with torch.no_grad():
        for i in range(1000):
            name = nodes[i * 7 % len(nodes)]
            tree.switch(name)
            if i % 10 == 0:
                assert torch.equal(tree.model(x), first.setdefault(name, tree.model(x)))
    assert all(torch.equal(value, weights[name]) for name, value in tree.model.state_dict().items())


@torch.no_grad()
def test_a_switch_goes_on_when_the_tree_changes():
    tree, x = make(), x_of(torch.float64)
    tree.switch("deep")
    tree.move("left", "right")
    assert near(tree.model(x), dense(tree, "deep")(x))
    assert tree.path("deep") == ["root", "right", "left", "deep"]
    tree.rename("deep", "deeper")
    assert near(tree.model(x), dense(tree, "deeper")(x))
    tree.remove("deeper")
    with pytest.raises(RuntimeError, match="within `with route"):
        tree.model(x)


def test_moving_and_detaching():
    tree = make()
    before = values(tree)
    tree.detach("left")  # with what is under it
    assert tree.parent("left") is None
    assert_is(tree, before)
    tree.move("deep", "right")
    assert tree.deltas("deep") == ("root", "right", "deep")
    assert_is(tree, {name: before[name] for name in ("root", "right", "left")})


def test_merging_into_the_parent():
    tree = make()
    before = values(tree)
    tree.remove("right")
    tree.merge_into_parent("left")
    assert tree.path("deep") == ["root", "deep"]
    assert "left" not in tree
    assert_is(tree, {"root": before["left"], "deep": before["deep"]})
    tree.merge_into_parent("deep")
    assert_is(tree, {"root": before["deep"]})


def test_merging_into_the_base():
    tree = make()
    before = values(tree)
    tree.merge_into_base("root")
    assert tree.children(None) == ["left", "right"]
    assert_is(tree, {name: before[name] for name in ("left", "right", "deep")})


@torch.no_grad()
def test_nodes_without_a_delta():
    tree = AdapterTree(net(torch.float64))
    tree.add("nothing")
    tree.add("a", "nothing", r=4, lora_alpha=4.0, target_modules=["up"])
    tree.add("group", "a")
    tree.add("b", "group", r=2, lora_alpha=1.0, target_modules=["up"])
    for name, parameter in tree.model.named_parameters():
        if "lora_" in name:
            parameter.normal_()
    assert tree.deltas("b") == ("a", "b")
    assert_is(tree, values(tree))
    assert str(tree) == "nothing (no delta)\n  a (r = 4)\n    group (no delta)\n      b (r = 2)"
    before = values(tree)
    tree.detach("group")
    assert tree.deltas("b") == ("group", "b")
    assert_is(tree, before)


def test_adapters_that_are_there_become_nodes():
    model = net(torch.float64)
    add_adapter(model, "a", 4, 4.0, target_modules=["up"])
    tree = AdapterTree(model)
    tree.add("a")
    tree.add("b", "a", r=2, lora_alpha=2.0, target_modules=["up"])
    assert tree.deltas("b") == ("a", "b")


@pytest.mark.filterwarnings("default")
def test_files(tmp_path):
    tree = make(torch.float32)
    tree.add("empty", "right")
    with pytest.warns(UserWarning, match="does not hold layers.0.norm.weight, .* and 1 more, which train") as said:
        tree.save(tmp_path / "tree")
    assert len(said) == 1  # and not once a node
    assert json.loads((tmp_path / "tree" / "tree.json").read_text())["nodes"]["deep"] == {
        "parent": "left",
        "delta": True,
    }
    again = AdapterTree.load(net(), tmp_path / "tree")
    assert str(again) == str(tree)
    x = x_of()
    for name in tree._parents:
        assert torch.equal(at(again, name, x), at(tree, name, x))
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "tree" / "root").eval()
    assert torch.allclose(theirs(x), at(tree, "root", x), atol=1e-5)
    model = net()
    load_adapter(model, tmp_path / "tree" / "deep", "deep")  # each by itself


@pytest.mark.filterwarnings("default")
def test_a_tree_that_cannot_be_loaded_leaves_nothing(tmp_path):
    tree = make(torch.float32)
    tree.save(tmp_path)
    (tmp_path / "right" / "adapter_model.safetensors").write_bytes(b"torn")
    model = net()
    with pytest.raises(ValueError, match="is damaged"):
        AdapterTree.load(model, tmp_path)
    assert not any("lora_" in name for name, _ in model.named_parameters())
    (tmp_path / "tree.json").write_text('{"nodes": {"left": {"parent": "root", "delta": true}}}')
    with pytest.raises(ValueError, match="is damaged: left has the parent 'root'"):
        AdapterTree.load(net(), tmp_path)
    with pytest.raises(ValueError, match="it has no tree"):
        AdapterTree.load(net(), tmp_path / "left")
    with pytest.raises(ValueError, match="no folder with a tree"):
        AdapterTree.load(net(), tmp_path / "nowhere")
    tree.save(tmp_path / "again")
    with pytest.raises(ValueError, match="no adapters of the tree's names, got deep, left, right, root"):
        AdapterTree.load(tree.model, tmp_path / "again")


@pytest.mark.parametrize(("call", "words"), [
    (lambda tree: tree.add("root", r=4, lora_alpha=4.0), "name must be new, got 'root'"),
    (lambda tree: tree.add("x", "nobody"), r"parent must be a node \(root, left, right, deep\), got 'nobody'"),
    (lambda tree: tree.add("a.b"), "name must not be empty, have dots"),
    (lambda tree: tree.path("x"), "name must be a node"),
    (lambda tree: tree.remove("left"), "without children, got 'left'"),
    (lambda tree: tree.move("root", "deep"), "parent must not be 'root' or below it, got 'deep'"),
    (lambda tree: tree.move("left", "left"), "parent must not be 'left' or below it"),
    (lambda tree: tree.rename("left", "deep"), "new must be the name of no node"),
    (lambda tree: tree.merge_into_parent("root"), "name must be no root"),
    (lambda tree: tree.merge_into_parent("left"), "'root' must have no other children, got right"),
    (lambda tree: tree.merge_into_base("left"), "name must be the only root"),
    (lambda tree: tree.switch("x"), "name must be a node"),
    (lambda tree: tree.route(["left", "x"]), "name must be a node"),
    (lambda tree: (tree.add("big", "deep", r=250, lora_alpha=1.0, target_modules=["up"]), tree.detach("big")),
     "ranks must add up to 256 at most, got 278"),
])  # fmt: skip
def test_errors(call, words):
    tree = make()
    before = values(tree)
    with pytest.raises(ValueError, match=words):
        call(tree)
    assert_is(tree, before)


@torch.no_grad()
def test_a_switch_goes_on_when_a_node_brings_new_layers():
    tree, x = make(), x_of(torch.float64)
    tree.remove("deep")
    tree.switch("left")
    tree.add("norms", "left", r=2, lora_alpha=1.0, target_modules=["out"])
    assert near(tree.model(x), dense(tree, "left")(x))


def test_names_with_slashes(tmp_path):
    tree = make(torch.float32)
    with pytest.raises(ValueError, match="name must have no slashes"):
        tree.add("a/b")
    with pytest.raises(ValueError, match="new must have no slashes"):
        tree.rename("left", "/tmp/left")
    (tmp_path / "tree.json").write_text('{"nodes": {"/x": {"parent": null, "delta": false}}}')
    with pytest.raises(ValueError, match="a node must have no slashes"):
        AdapterTree.load(net(), tmp_path)


@pytest.mark.filterwarnings("ignore:an adapter does not hold")
def test_killed_while_saving(tmp_path, monkeypatch):
    """The whole tree that was there, or the whole new one."""
    tree = make()

    def save(folder, word):
        with torch.no_grad():
            for name, parameter in tree.model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_({"old": 1.0, "new": 2.0, "next": 3.0}[word])
        tree.save(folder)

    def read(folder):
        loaded = AdapterTree.load(net(torch.float64), folder)
        values = {p.detach().mean().item() for name, p in loaded.model.named_parameters() if "lora_B" in name}
        assert len(values) == 1
        return values.pop()

    def check(folder):
        assert read(folder) == 3.0

    found = found_by_kills(tmp_path, monkeypatch, save, read, check)
    assert found == sorted(found)
    assert found[0] == 1.0
    assert found[-1] == 2.0
