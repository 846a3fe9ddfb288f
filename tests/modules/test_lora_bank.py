"""LoRABank and its adapters: where factors lie, and that nobody touches another's."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from fused_lora import LoRABank, LoRALinear, route
from fused_lora.reference import dropout

K, N = 40, 24
RANKS = {"a": 8, "b": 16, "c": 3, "d": 64}


def make_bank(dtype=torch.float64, ranks=None, **options):
    torch.manual_seed(0)
    bank = LoRABank(K, N, dtype=dtype, **options)
    for i, (name, r) in enumerate((ranks or RANKS).items()):
        bank.add_adapter(name, r, lora_alpha=2.0 + i)
        with torch.no_grad():
            bank.factors(name)[1].normal_()
    return bank


def alone(bank, name):
    """The same adapter in a LoRALinear."""
    adapter = bank.adapters[name]
    dtypes = dict(dtype=bank.weight.dtype, lora_dtype=bank.factors(name)[0].dtype)
    layer = LoRALinear(K, N, adapter.r, adapter.lora_alpha, use_rslora=adapter.use_rslora, **dtypes)
    layer.load_state_dict(
        {"weight": bank.weight, "bias": bank.bias, "lora_A": bank.factors(name)[0], "lora_B": bank.factors(name)[1]}
    )
    return layer


def near(one, other, tolerance=1e-11):
    return (one - other).abs().max().item() <= tolerance * max(1, other.abs().max().item())


def assert_as_alone(bank, names=None):
    x = torch.randn(6, K, dtype=bank.weight.dtype)
    for name in names or bank.adapters:
        with route(bank, name):
            assert near(bank(x), alone(bank, name)(x)), name


def test_each_adapter_computes_as_by_itself():
    bank = make_bank()
    assert_as_alone(bank)
    bank.set_lora_alpha("b", 11.0)
    assert_as_alone(bank)


def test_adapters_drop_what_enters_them_by_their_own_p():
    bank = make_bank(bias=False)
    for name, p in {"a": 0.5, "b": 0.0, "c": 0.75}.items():
        bank.set_lora_dropout(name, p)
    x = torch.randn(8, K, dtype=torch.float64)
    torch.manual_seed(9)
    seed = torch.randint(2**62, ())
    torch.manual_seed(9)
    with route(bank, ["a", "b", ("b", "c"), "__base__"]):
        y = bank(x)
    want = x @ bank.weight.T
    for rows, level, name in (((0, 2), 0, "a"), ((2, 6), 0, "b"), ((4, 6), 1, "c")):
        (A, B), adapter = bank.factors(name), bank.adapters[name]
        dropped = dropout(x, adapter.lora_dropout, seed + level)
        want[slice(*rows)] += (adapter.scaling * dropped @ A.T @ B.T)[slice(*rows)]
    assert near(y, want)
    assert bank.dropping == 0.75
    assert bank.eval().dropping == 0.0


@pytest.mark.parametrize("change", [
    lambda bank: bank.set_lora_alpha("b", 3.0), lambda bank: bank.set_lora_dropout("b", 0.1),
    lambda bank: bank.set_lora_dropout("a", 0.1), lambda bank: bank.add_adapter("z", 4), lambda bank: bank.cpu(),
])  # fmt: skip
def test_what_is_set_after_a_forward_pass_is_none_of_its_backward_pass(change):
    grads = []
    for changes in (False, True):
        bank = make_bank()
        bank.set_lora_dropout("a", 0.5)
        x = torch.randn(8, K, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(1)
        with route(bank, "a"):
            y = bank(x)
        if changes:
            change(bank)
        grads.append(torch.autograd.grad(y.sum(), [x, *bank.factors("a")]))
    assert all(map(torch.equal, *grads))


def test_rows_have_their_adapters_and_the_base():
    bank = make_bank()
    x = torch.randn(3, 5, K, dtype=torch.float64)
    with route(bank, ["b", "__base__", "d"]):
        y = bank(x)
    assert near(y[0], alone(bank, "b")(x[0]))
    assert torch.equal(y[1], nn.functional.linear(x, bank.weight, bank.bias)[1])
    assert near(y[2], alone(bank, "d")(x[2]))


def test_rows_that_nobody_adapts_are_the_bases_bit_for_bit():
    bank = make_bank(torch.float32)
    x = torch.randn(300, K)
    base = nn.functional.linear(x, bank.weight, bank.bias)
    with route(bank, ["__base__", "a"], rows=[290, 10]):
        assert torch.equal(bank(x)[:290], base[:290])
    with route(bank, "__base__"):
        assert torch.equal(bank(x), base)


def test_new_adapters_begin_as_a_linear():
    bank = make_bank(ranks={"a": 4})
    bank.add_adapter("new", 16)
    x = torch.randn(5, K, dtype=torch.float64)
    with route(bank, "new"):
        assert torch.equal(bank(x), nn.functional.linear(x, bank.weight, bank.bias))
    A, B = bank.factors("new")
    assert A.abs().max() <= K**-0.5
    assert A.abs().max() > 0.9 * K**-0.5
    assert torch.equal(B, torch.zeros_like(B))


def test_rslora():
    bank = make_bank()
    bank.add_adapter("s", 9, lora_alpha=6.0, use_rslora=True)
    assert bank.adapters["s"].scaling == 2.0
    assert bank.adapters["a"].scaling == 0.25


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_of_one_leaves_every_other_one_alone(optimizer):
    """Its values, and what its optimizer keeps, also under weight decay."""
    bank = make_bank()
    options = {"lr": 0.1, "weight_decay": 0.1} | ({"momentum": 0.9} if optimizer is torch.optim.SGD else {})
    steps = {name: optimizer(bank.factors(name), **options) for name in bank.adapters}
    x = torch.randn(40, K, dtype=torch.float64)

    def train(names):
        with route(bank, names):
            bank(x).square().sum().backward()
        for name in set(names):
            steps[name].step()
            steps[name].zero_grad()

    train(["a", "b", "c", "d"])
    before = {name: copy.deepcopy((bank.factors(name), steps[name].state_dict())) for name in bank.adapters}
    train(["a", "a"])
    for name in ("b", "c", "d"):
        factors, state = before[name]
        assert all(map(torch.equal, bank.factors(name), factors))
        torch.testing.assert_close(steps[name].state_dict(), state, rtol=0, atol=0)
    assert not torch.equal(bank.factors("a")[0], before["a"][0][0])
    assert_as_alone(bank)


def test_memory_grows_and_parameters_stay_what_they_are():
    bank = make_bank(ranks={"a": 16})
    a = bank.factors("a")
    optimizer = torch.optim.AdamW(a)
    x = torch.randn(8, K, dtype=torch.float64)
    with route(bank, "a"):
        bank(x).sum().backward()
    optimizer.step()
    values = [factor.clone() for factor in a]
    for i in range(60):
        bank.add_adapter(f"more{i}", (16, 64, 1, 256)[i % 4])
    assert bank.factors("a") == a
    assert all(map(torch.equal, a, values))
    optimizer.zero_grad()
    with route(bank, "a"):
        bank(x).sum().backward()
    optimizer.step()
    assert not torch.equal(a[0], values[0])
    assert_as_alone(bank, ["a", "more59"])


def test_places_do_not_overlap_and_lie_in_one_window():
    bank = make_bank(ranks={f"n{i}": (1, 16, 17, 64, 65, 256)[i % 6] for i in range(30)})
    ranks = []
    for adapter in bank.adapters.values():
        place = adapter.place
        assert place.rank % place.size == 0
        assert place.size >= adapter.r
        ranks += range(place.rank, place.rank + place.size)
    assert len(set(ranks)) == len(ranks)


def test_a_thousand_adapters():
    bank = make_bank(torch.float32, ranks={f"n{i}": 4 for i in range(1100)})
    x = torch.randn(1100, K)
    with route(bank, list(bank.adapters)):
        y = bank(x)
    for i in (0, 17, 1099):
        assert near(y[i], alone(bank, f"n{i}")(x[i]), 1e-5)


def test_factors_are_dense():
    """As fused optimizers want them."""
    for name, r in RANKS.items():
        A, B = make_bank().factors(name)
        assert A.shape == (r, K)
        assert B.shape == (N, r)
        assert A.is_contiguous()
        assert B.t().is_contiguous()


def test_a_deleted_adapter_leaves_nothing_to_the_next_one():
    bank = make_bank(ranks={"a": 64})
    held = bank.factors("a")
    values = [factor.clone() for factor in held]
    place = bank.adapters["a"].place
    bank.delete_adapter("a")
    bank.add_adapter("b", 40)
    assert bank.adapters["b"].place == place
    with torch.no_grad():
        bank.factors("b")[1].normal_()
        for factor in held:  # which is nobody's any more
            factor.fill_(float("nan"))
    assert_as_alone(bank)
    assert not all(map(torch.equal, held, values))


def test_an_adapter_of_a_smaller_rank_in_the_place_of_a_larger_one():
    bank = make_bank(ranks={"a": 64})
    bank.delete_adapter("a")
    bank.add_adapter("a", 4)
    with torch.no_grad():
        bank.factors("a")[1].normal_()
    assert_as_alone(bank)


def test_delete_create_train():
    bank = make_bank(ranks={"a": 8})
    bank.delete_adapter("a")
    bank.add_adapter("a", 8)
    x = torch.randn(8, K, dtype=torch.float64)
    for _ in range(2):
        with route(bank, "a"):
            bank(x).square().sum().backward()
        with torch.no_grad():
            for factor in bank.factors("a"):
                factor -= 0.01 * factor.grad
    assert all(factor.grad.abs().max() > 0 for factor in bank.factors("a"))


def test_rename():
    bank = make_bank()
    before = bank.factors("b")
    bank.rename_adapter("b", "e")
    assert bank.factors("e") == before
    assert list(bank.adapters) == ["a", "e", "c", "d"]
    assert [name for name, _ in bank.lora_A.named_parameters()] == ["a", "e", "c", "d"]
    assert_as_alone(bank)


@pytest.mark.parametrize("change", [
    lambda bank: bank.to(torch.float32),
    lambda bank: bank.float().double(),
    lambda bank: copy.deepcopy(bank),
    lambda bank: pickle.loads(pickle.dumps(bank)),
    lambda bank: torch.load(_saved(bank), weights_only=False),
])  # fmt: skip
def test_banks_move(change):
    bank = change(make_bank())
    x = torch.randn(6, K, dtype=bank.weight.dtype)
    for name in bank.adapters:
        with route(bank, name):
            assert near(bank(x), alone(bank, name)(x), 1e-5)
        with torch.no_grad():
            bank.factors(name)[0].mul_(1.5)  # what is trained is what is computed
        with route(bank, name):
            assert near(bank(x), alone(bank, name)(x), 1e-5)


def _saved(bank):
    file = io.BytesIO()
    torch.save(bank, file)
    file.seek(0)
    return file


def test_a_copy_is_not_its_model():
    bank = make_bank()
    other = copy.deepcopy(bank)
    with torch.no_grad():
        other.factors("a")[0].zero_()
    assert bank.factors("a")[0].abs().max() > 0
    with route(bank, "a"), pytest.raises(RuntimeError, match="within `with route"):
        other(torch.zeros(2, K, dtype=torch.float64))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(assign):
    bank, other = make_bank(), make_bank()
    state = {name: torch.randn_like(tensor) for name, tensor in bank.state_dict().items()}
    assert set(state) == {"weight", "bias", *(f"lora_{f}.{name}" for f in "AB" for name in RANKS)}
    other.load_state_dict(state, assign=assign)
    assert_as_alone(other)
    for name in RANKS:
        assert torch.equal(other.factors(name)[0], state[f"lora_A.{name}"])


def test_data_that_is_put_in_from_outside_counts():
    bank = make_bank()
    bank.factors("a")[0].data = torch.randn(8, K, dtype=torch.float64)
    assert_as_alone(bank)


def test_meta_and_to_empty():
    with torch.device("meta"):
        bank = make_bank(ranks={"a": 8, "b": 4})
    bank.to_empty(device="cpu")
    source = make_bank(ranks={"a": 8, "b": 4})
    bank.load_state_dict(source.state_dict())
    assert_as_alone(bank)


def test_factors_in_float32_over_a_base_in_bfloat16():
    bank = make_bank(torch.bfloat16, lora_dtype=torch.float32)
    x = torch.randn(20, K, dtype=torch.bfloat16)
    with route(bank, "b"):
        y = bank(x)
        y.sum().backward()
    assert y.dtype is torch.bfloat16
    assert bank.factors("b")[0].grad.dtype is torch.float32
    assert near(y.float(), alone(bank, "b")(x).float(), 2e-2)


def test_frozen_adapters_have_no_gradients():
    bank = make_bank()
    for factor in bank.factors("a"):
        factor.requires_grad_(False)
    x = torch.randn(4, K, dtype=torch.float64)
    with route(bank, ["a", "b"]):
        bank(x).sum().backward()
    assert all(factor.grad is None for factor in bank.factors("a"))
    assert all(factor.grad is not None for factor in bank.factors("b"))
    assert bank.weight.grad is None


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda bank: bank.add_adapter("a", 4), ValueError, "name must be new, got 'a'"),
    (lambda bank: bank.add_adapter("x.y", 4), ValueError, "name must not be empty, have dots"),
    (lambda bank: bank.add_adapter("__base__", 4), ValueError, "name must not be empty"),
    (lambda bank: bank.add_adapter("train", 4), ValueError, "name must be none that every nn.Module has"),
    (lambda bank: bank.add_adapter(3, 4), TypeError, "name must be a str, got int"),
    (lambda bank: bank.add_adapter("e", 0), ValueError, "r must be between"),
    (lambda bank: bank.add_adapter("e", 257), ValueError, "r must be at most 256 in a bank"),
    (lambda bank: bank.add_adapter("e", 4, float("nan")), ValueError, "lora_alpha must be finite"),
    (lambda bank: bank.delete_adapter("e"), ValueError, r"one of the bank's adapters \(a, b, c, d\), got 'e'"),
    (lambda bank: bank.rename_adapter("a", "b"), ValueError, "name must be new, got 'b'"),
    (lambda bank: bank.rename_adapter("e", "f"), ValueError, "one of the bank's adapters"),
    (lambda bank: bank.set_lora_alpha("a", float("inf")), ValueError, "lora_alpha must be finite"),
    (lambda bank: LoRABank(4, 4, capacity=-1), ValueError, "capacity must be at least 0"),
    (lambda bank: LoRABank(4, 4, lora_dtype=torch.int8), TypeError, "lora_dtype must be"),
    (lambda bank: bank(torch.zeros(2, K, dtype=torch.float64)), RuntimeError, r"within `with route\(model, names\)`"),
])  # fmt: skip
def test_errors(call, error, words):
    bank = make_bank()
    before = copy.deepcopy(bank.state_dict())
    with pytest.raises(error, match=words):
        call(bank)
    torch.testing.assert_close(bank.state_dict(), before, rtol=0, atol=0)
    assert_as_alone(bank)


def test_scales_of_places_that_others_had():
    """Of other sizes, scales or dropout; what is there already is not written again."""
    bank = make_bank()
    slab, place = bank._slab, bank.adapters["a"].place
    slices = slice(place.rank // 16, (place.rank + place.size) // 16)
    version = lambda: slab.scales._version  # noqa: E731
    slab.rescale(place, 3.0, 0.5)
    assert set(slab.scales[slices].tolist()) == {3.0}
    before = version()
    slab.rescale(place, 3.0, 0.5)
    assert version() == before
    slab.rescale(place._replace(size=16), 5.0)
    slab.rescale(place, 3.0, 0.5)
    assert set(slab.scales[slices].tolist()) == {3.0}
    assert set(slab.keeps[slices].tolist()) == {2.0}
    bank.to(torch.float32).to("meta").to_empty(device="cpu")
    for name, adapter in bank.adapters.items():
        own = slice(adapter.place.rank // 16, (adapter.place.rank + adapter.place.size) // 16)
        assert bank._slab.scales[own].tolist() == pytest.approx([adapter.scaling] * (adapter.place.size // 16)), name
