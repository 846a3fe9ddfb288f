"""AdapterCache on the host alone: what is where, and that nobody gets another adapter's result."""

import copy

import pytest
import torch

from fused_lora import AdapterCache, LoRABank, add_adapter, route
from tests.adapters.models import by_peft, net, randomised, x_of

pytestmark = pytest.mark.filterwarnings("default")  # PEFT warns of its own affairs
LAYERS = {"layers.0.up": (9, 7), "layers.0.down": (7, 9), "layers.1.up": (9, 7), "layers.1.down": (7, 9)}
TARGETS = ["up", "down"]


def factors_of(seed, r=3, layers=LAYERS):
    generator = torch.Generator().manual_seed(seed)
    rnd = lambda *sizes: torch.randn(*sizes, generator=generator)  # noqa: E731
    return {layer: (rnd(r, K), rnd(N, r)) for layer, (K, N) in layers.items()}


def make(slots=2, r=16, host=20, **options):
    return AdapterCache(net(), slots, r, host, **({"target_modules": TARGETS} | options))


def filled(count=6, **options):
    cache = make(**options)
    for i in range(count):
        cache.put(f"n{i}", factors_of(i), lora_alpha=2.0 + i)
    return cache


def expected(factors, lora_alpha):
    """A model whose weights have the adapter in them."""
    model = net()
    for layer, (A, B) in factors.items():
        model.get_submodule(layer).weight.data += lora_alpha / len(A) * (B @ A)
    return model


@torch.no_grad()
def assert_is(cache, i, seed=None, lora_alpha=None):
    x, want = x_of(), expected(factors_of(i if seed is None else seed), lora_alpha or 2.0 + i)
    with cache.route(f"n{i}"):
        assert torch.allclose(cache.model(x), want(x), atol=1e-5)


def test_many_adapters_in_few_slots():
    cache = filled()
    for i in (0, 3, 1, 5, 5, 2, 4, 0, 3):
        assert_is(cache, i)
        assert len(cache.resident) <= 2
    assert cache.resident == ["n0", "n3"]


@torch.no_grad()
def test_rows_of_one_batch():
    cache, x = filled(), torch.randn(4, 5, 9)
    with cache.route(["n4", "__base__", "n1", "n4"]):
        y = cache.model(x)
    for row, i in ((0, 4), (2, 1), (3, 4)):
        assert torch.allclose(y[row], expected(factors_of(i), 2.0 + i)(x[row]), atol=1e-5)
    assert torch.allclose(y[1], net()(x[1]), atol=1e-6)


def test_the_longest_unused_one_leaves():
    cache = filled(slots=3)
    cache.prefetch(["n0", "n1", "n2"])
    assert_is(cache, 0)
    cache.prefetch(["n3"])
    assert cache.resident == ["n2", "n0", "n3"]
    cache.pin("n2")
    cache.prefetch(["n4", "n5"])
    assert cache.resident == ["n2", "n4", "n5"]
    cache.unpin("n2")
    cache.prefetch(["n1"])
    assert cache.resident == ["n4", "n5", "n1"]


def test_what_is_resident_does_not_move():
    cache = filled()
    cache.prefetch(["n1"])
    cache._blobs.bring = None  # nobody may call it
    for _ in range(3):
        assert_is(cache, 1)


def test_full_of_pins():
    cache = filled()
    cache.pin("n0")
    cache.pin("n0")
    cache.pin("n1")
    with pytest.raises(RuntimeError, match="all 2 slots have adapters that are pinned or in a route"):
        cache.prefetch(["n2"])
    with pytest.raises(RuntimeError, match="all 2 slots"), cache.route(["n1", "n2"]):
        pass
    cache.unpin("n0")
    with pytest.raises(RuntimeError, match="all 2 slots"):
        cache.prefetch(["n2"])
    cache.unpin("n0")
    assert_is(cache, 2)


def test_a_route_keeps_its_adapters():
    cache = filled()
    with cache.route(["n0", "n1"], rows=[1, 1]), pytest.raises(RuntimeError, match="all 2 slots"):
        cache.prefetch(["n2"])
    cache.prefetch(["n2", "n3"])
    assert cache.resident == ["n2", "n3"]


def test_a_stale_route_is_an_error():
    """Also where its slot has another adapter under the same name."""
    cache = filled()
    cache.prefetch(["n0"])
    stale = route(cache.model, "n0")
    cache.prefetch(["n1", "n2"])
    with pytest.raises(RuntimeError, match="deleted, renamed or added since"), stale:
        cache.model(x_of())
    cache.remove("n0")
    cache.put("n0", factors_of(77), lora_alpha=3.0)
    cache.prefetch(["n0"])
    with pytest.raises(RuntimeError, match="deleted, renamed or added since"), stale:
        cache.model(x_of())
    assert_is(cache, 0, seed=77, lora_alpha=3.0)


def test_a_backward_pass_through_an_adapter_that_left_is_an_error():
    cache = filled()
    x = x_of().requires_grad_()
    with cache.route("n0"):
        y = cache.model(x)
    with cache.route("n1"):
        z = cache.model(x)
    assert torch.autograd.grad(z.sum(), x)[0].isfinite().all()
    cache.prefetch(["n2", "n3"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_smaller_rank_in_the_slot_of_a_larger_one():
    cache = make(slots=1)
    cache.put("n0", factors_of(0, r=16), lora_alpha=2.0)
    cache.put("n1", factors_of(1, r=2), lora_alpha=2.0)
    with cache.route("n0"), torch.no_grad():
        assert torch.allclose(cache.model(x_of()), expected(factors_of(0, r=16), 2.0)(x_of()), atol=1e-4)
    with cache.route("n1"), torch.no_grad():
        assert torch.allclose(cache.model(x_of()), expected(factors_of(1, r=2), 2.0)(x_of()), atol=1e-5)


def test_layers_that_an_adapter_has_not():
    cache = make(slots=1)
    some = {layer: LAYERS[layer] for layer in list(LAYERS)[:2]}
    cache.put("n0", factors_of(0), lora_alpha=2.0)
    cache.put("n1", factors_of(1, layers=some), lora_alpha=2.0)
    for name, layers in (("n0", LAYERS), ("n1", some)):
        with cache.route(name), torch.no_grad():
            want = expected(factors_of(int(name[1]), layers=layers), 2.0)
            assert torch.allclose(cache.model(x_of()), want(x_of()), atol=1e-5)


def test_buffers_of_the_callers_are_copied():
    cache, factors = make(), factors_of(0)
    cache.put("n0", factors, lora_alpha=2.0)
    for A, B in factors.values():
        A.fill_(float("nan"))
        B.zero_()
    assert_is(cache, 0)


def test_a_name_again():
    cache = filled()
    assert_is(cache, 0)
    cache.remove("n0")
    cache.put("n0", factors_of(50), lora_alpha=9.0)
    assert_is(cache, 0, seed=50, lora_alpha=9.0)


def test_folders_of_peft(tmp_path):
    models = {}
    for seed, r in enumerate((3, 16, 8)):
        models[f"n{seed}"] = randomised(by_peft(r=r, use_rslora=r == 8), seed)
        models[f"n{seed}"].save_pretrained(tmp_path / f"n{seed}")
    cache = make()
    assert cache.add_folder(tmp_path) == ["n0", "n1", "n2"]
    assert cache.resident == []
    for name in ("n2", "n0", "n1", "n2"):
        with cache.route(name), torch.no_grad():
            assert torch.allclose(cache.model(x_of()), models[name].eval()(x_of()), atol=1e-5)


def test_files_are_read_when_they_are_wanted(tmp_path):
    by_peft(r=3).save_pretrained(tmp_path / "good")
    by_peft(r=3).save_pretrained(tmp_path / "torn")
    by_peft(r=32).save_pretrained(tmp_path / "large")
    (tmp_path / "torn" / "adapter_model.safetensors").write_bytes(b"torn")
    by_peft(r=3, target_modules=["out"]).save_pretrained(tmp_path / "other")
    cache = make()
    cache.add_folder(tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        cache.prefetch(["torn"])
    with pytest.raises(ValueError, match=r"large has r=32 in layers\.0\.\w+, slots are for r=16 at most"):
        cache.prefetch(["large"])
    with pytest.raises(ValueError, match="out of other is none of the cache's layers"):
        cache.prefetch(["other"])
    cache.prefetch(["good"])
    assert cache.resident == ["good"]


def test_adapters_that_train_stand_beside():
    """Those of add_adapter, in the same banks."""
    cache = filled()
    add_adapter(cache.model, "mine", 4, 4.0, target_modules=TARGETS)
    trained = [name for name, parameter in cache.model.named_parameters() if "lora_" in name]
    assert len(trained) == 8
    with cache.route(["n0", "n1"], rows=[20, 20]):
        pass
    x = torch.randn(2, 3, 9)
    cache.pin("n0")
    with route(cache.model, ["mine", "n0"]):
        y = cache.model(x)
    y.sum().backward()
    assert torch.allclose(y[1], expected(factors_of(0), 2.0)(x[1]), atol=1e-5)
    for i in range(12):  # the slabs grow
        add_adapter(cache.model, f"more{i}", 16, 4.0, target_modules=TARGETS)
    assert_is(cache, 0)
    assert_is(cache, 3)


def test_copies_of_the_model_have_no_cache():
    cache = filled()
    cache.prefetch(["n0"])
    twin = copy.deepcopy(cache.model)
    banks = [module for module in twin.modules() if isinstance(module, LoRABank)]
    assert banks
    for bank in banks:  # nothing of it is taken
        assert not any(bank._slab.taken)
        assert not bank._slab.A.any()
    with pytest.raises(ValueError, match="names must be adapters of the model"):
        route(twin, "n0")
    assert_is(cache, 0)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda cache: cache.put("n0", factors_of(0), 1.0), ValueError, "name must be new, got 'n0'"),
    (lambda cache: cache.put("a.b", factors_of(0), 1.0), ValueError, "name must not be empty, have dots"),
    (lambda cache: cache.put("x", factors_of(0, r=17), 1.0), ValueError, "slots are for r=16 at most"),
    (lambda cache: cache.put("x", {"out": (torch.zeros(2, 9), torch.zeros(5, 2))}, 1.0), ValueError,
     "out of x is none of the cache's layers"),
    (lambda cache: cache.put("x", {"layers.0.up": (torch.zeros(2, 8), torch.zeros(7, 2))}, 1.0), ValueError,
     r"has the shape \(2, 8\)"),
    (lambda cache: cache.put("x", factors_of(0, r=0), 1.0), ValueError, "x has r=0 in .*, which must be at least 1"),
    (lambda cache: cache.put("x", {}, 1.0), ValueError, "x must have factors of at least one layer, got none"),
    (lambda cache: cache.prefetch("n1"), TypeError, "names must be several names, got the str 'n1'"),
    (lambda cache: cache.route(["n0", "z"]), ValueError, "name must be an adapter of the cache, got 'z'"),
    (lambda cache: cache.route(["n0", "n1", "n2"]), ValueError, "names must be at most 2 adapters"),
    (lambda cache: cache.prefetch(["z"]), ValueError, "name must be an adapter of the cache"),
    (lambda cache: cache.remove("z"), ValueError, "name must be an adapter of the cache"),
    (lambda cache: cache.unpin("n0"), ValueError, "name must be pinned, got 'n0'"),
    (lambda cache: (cache.pin("n0"), cache.remove("n0")), ValueError, "name must not be pinned or in a route"),
    (lambda cache: cache.add("x", "nowhere"), ValueError, "nowhere is no adapter"),
    (lambda cache: cache.add_folder("nowhere"), ValueError, "nowhere has no folders with adapters"),
    (lambda cache: [cache.put(f"x{i}", factors_of(i), 1.0) for i in range(20)], RuntimeError, "holds 20 adapters"),
    (lambda cache: make(slots=0), ValueError, "slots must be at least 1, got 0"),
    (lambda cache: make(target_modules=["nothing"]), ValueError, "no nn.Linear that can be replaced"),
])  # fmt: skip
def test_errors(call, error, words):
    cache = filled()
    with pytest.raises(error, match=words):
        call(cache)
    assert_is(cache, 0)
    assert_is(cache, 5)


def test_a_rank_that_no_bank_has_changes_nothing():
    model = net()
    before = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(ValueError, match="r must be at most 256 in a bank, got 257"):
        AdapterCache(model, slots=2, r=257, host=20, target_modules=TARGETS)
    assert {path: type(module) for path, module in model.named_modules()} == before


def test_names_that_a_bank_has_got_meanwhile():
    """Nothing is brought half way."""
    cache = filled()
    assert_is(cache, 0)
    add_adapter(cache.model, "n4", 2, 1.0, target_modules=["down"])
    with pytest.raises(ValueError, match="name must be new, got 'n4'"):
        cache.prefetch(["n4"])
    assert cache.resident == ["n0"]
    assert_is(cache, 0)
    assert_is(cache, 1)


def test_prefetching_before_a_backward_pass():
    cache = filled()
    x = x_of().requires_grad_()
    with cache.route("n0"):
        y = cache.model(x)
    cache.prefetch(["n1"])
    (dx,) = torch.autograd.grad(y.sum(), x)
    (want,) = torch.autograd.grad(expected(factors_of(0), 2.0)(x).sum(), x)
    assert torch.allclose(dx, want, atol=1e-5)


def test_what_would_spoil_others_is_refused():
    cache, bad = make(), factors_of(0)
    bad["layers.0.up"][0][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"factors of n0 in layers\.0\.up must be finite"):
        cache.put("n0", bad, 1.0)
    with pytest.raises(ValueError, match="lora_alpha must be finite"):
        cache.put("n0", factors_of(0), float("nan"))
    assert len(cache) == 0
    model = net()
    model.layers[0].up.to(torch.bfloat16)
    with pytest.raises(ValueError, match="of one dtype on one device"):
        AdapterCache(model, 2, 16, 20, target_modules=TARGETS)
