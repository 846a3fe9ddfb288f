"""CachedTree against the AdapterTree that was saved, and what it moves."""

import json

import pytest
import torch

from fused_lora import AdapterCache, AdapterTree, CachedTree
from fused_lora.adapters.host_memory import Blobs
from tests.adapters.models import net, x_of

pytestmark = pytest.mark.filterwarnings("ignore:an adapter does not hold")
TARGETS = ["up", "down"]
NODES = {
    "root": None, "left": "root", "right": "root", "deep": "left", "deeper": "deep", "other": None, "bare": "right",
    "below": "bare",
}  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    """(the tree, its folder)."""
    tree = AdapterTree(net())
    for i, (name, parent) in enumerate(NODES.items()):
        options = {} if name == "bare" else dict(r=2 + i, lora_alpha=3.0 + i, target_modules=TARGETS)
        tree.add(name, parent, **options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in tree.model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    tree.save(tmp_path / "tree")
    return tree, tmp_path / "tree"


def cached(folder, slots=4):
    return CachedTree(AdapterCache(net(), slots, 16, 20, target_modules=TARGETS), folder)


def model_of(tree):
    return tree._cache.model


@pytest.fixture
def moved(monkeypatch):
    """The names of what is brought into slots, in order."""
    names, real = [], Blobs.bring
    monkeypatch.setattr(
        Blobs, "bring", lambda self, name, *args, **kw: names.append(name) or real(self, name, *args, **kw)
    )
    return names


@torch.no_grad()
def test_nodes_compute_what_they_did(saved):
    whole, folder = saved
    tree = cached(folder, slots=8)  # what is switched to stays while others are computed
    assert [tree.path(name) for name in NODES] == [whole.path(name) for name in NODES]
    assert tree.deltas("below") == ("root", "right", "below")
    x = x_of()
    for name in (*NODES, "root", "__base__", "deeper"):
        with whole.route(name):
            want = whole.model(x)
        with tree.route(name):
            assert torch.allclose(model_of(tree)(x), want, atol=1e-5), name
        tree.switch(name)
        assert torch.allclose(model_of(tree)(x), want, atol=1e-5), name


@torch.no_grad()
def test_rows_at_different_nodes(saved):
    whole, folder = saved
    tree, x = cached(folder), torch.randn(4, 5, 9)
    names = ["deep", "__base__", "right", "root"]
    with whole.route(names):
        want = whole.model(x)
    with tree.route(names):
        assert torch.allclose(model_of(tree)(x), want, atol=1e-5)


def test_a_switch_moves_what_differs(saved, moved):
    tree = cached(saved[1])
    for name, brought in (
        ("deep", ["root", "left", "deep"]), ("left", []), ("right", ["right"]), ("deep", []), ("deeper", ["deeper"]),
        ("__base__", []), ("other", ["other"]), ("root", ["root"]),
    ):  # fmt: skip
        moved.clear()
        tree.switch(name)
        assert moved == brought, name


@torch.no_grad()
def test_what_is_switched_to_stays(saved):
    """Routes beside it find no slot, and leave it as it is."""
    tree, x = cached(saved[1], slots=3), x_of()
    tree.switch("deep")
    want = model_of(tree)(x)
    with pytest.raises(RuntimeError, match="all 3 slots"), tree.route("right"):
        pass
    with pytest.raises(RuntimeError, match="all 3 slots"):
        tree.switch("other")
    assert torch.equal(model_of(tree)(x), want)
    tree.switch("__base__")
    tree.switch("other")
    assert not torch.allclose(model_of(tree)(x), want)


def test_errors(saved):
    tree = cached(saved[1])
    for call in (tree.path, tree.switch, tree.route, lambda name: tree.prefetch([name])):
        with pytest.raises(ValueError, match="must be a node"):
            call("nobody")
    with pytest.raises(ValueError, match="no adapters of the tree's names"):
        CachedTree(tree._cache, saved[1])
    (saved[1] / "tree.json").write_text(json.dumps({"nodes": {"a": {"parent": "b", "delta": True}}}))
    with pytest.raises(ValueError, match="damaged"):
        cached(saved[1])


def test_prefetching(saved, moved):
    tree = cached(saved[1])
    tree.prefetch(["deep"])
    assert moved == ["root", "left", "deep"]
    tree.switch("deep")
    assert len(moved) == 3


def test_what_the_cache_loses_or_gets_is_no_other_nodes(saved):
    tree = cached(saved[1])
    tree._cache.remove("root")
    with pytest.raises(ValueError, match="must be an adapter of the cache, got 'root'"):
        tree.route("left")
    factors = {
        f"layers.0.{name}": (torch.ones(2, K), torch.ones(N, 2)) for name, K, N in (("up", 9, 7), ("down", 7, 9))
    }
    tree._cache.put("bare", factors, lora_alpha=2.0)
    assert "bare" not in tree.deltas("below")


def test_a_folder_that_is_missing_leaves_the_cache_as_it_was(saved):
    (saved[1] / "deep").rename(saved[1] / "gone")
    cache = AdapterCache(net(), 4, 16, 20, target_modules=TARGETS)
    with pytest.raises(ValueError, match="is no adapter"):
        CachedTree(cache, saved[1])
    assert len(cache) == 0


@torch.no_grad()
def test_a_route_within_itself(saved):
    tree, x = cached(saved[1]), x_of()
    routed = tree.route("left")
    with routed:
        with routed:
            want = model_of(tree)(x)
        assert torch.equal(model_of(tree)(x), want)
    with pytest.raises(RuntimeError, match="within"):
        model_of(tree)(x)
    assert not any(tree._cache._pins.values())
