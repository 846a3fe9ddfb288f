"""Layers that are computed together: each gives what it gives alone, in any order and with any x it is called."""

import copy

import pytest
import torch
from torch import nn

from fused_lora import replace_linear
from fused_lora.modules import LoRAGroup, LoRALinear


class Attention(nn.Module):
    """The projections of one, called as a model's code calls them."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(24, 32), nn.Linear(24, 8, bias=False), nn.Linear(24, 8)

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def make_pair(dropout=0.0):
    """The same layers twice: alone, and as a group."""
    torch.manual_seed(0)
    alone = Attention()
    replace_linear(alone, r=4, lora_alpha=8, lora_dropout=dropout)
    for layer in (alone.q, alone.k, alone.v):
        layer.lora_B.data.normal_()
    grouped = copy.deepcopy(alone)
    LoRAGroup([grouped.q, grouped.k, grouped.v])
    return alone, grouped


@pytest.fixture
def computed(monkeypatch):
    """How often a group was computed."""
    seen, real = [], LoRAGroup._compute
    monkeypatch.setattr(LoRAGroup, "_compute", lambda group, x, training: (seen.append(x), real(group, x, training)))
    return seen


def test_a_group_gives_what_its_layers_give(computed):
    alone, grouped = make_pair()
    x = torch.randn(5, 24, requires_grad=True)
    for _ in range(2):
        wanted, got = alone(x), grouped(x)
        assert torch.allclose(got, wanted, atol=1e-5)
        dy = torch.randn_like(wanted)
        theirs = torch.autograd.grad(wanted, [x, *(p for p in alone.parameters() if p.requires_grad)], dy)
        ours = torch.autograd.grad(got, [x, *(p for p in grouped.parameters() if p.requires_grad)], dy)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))
    assert len(computed) == 2
    assert not grouped.q.group._of, "nothing of x is held"


def test_any_order_and_any_x(computed):
    alone, grouped = make_pair()
    x, z = torch.randn(3, 24), torch.randn(2, 24)
    for name, of in (("v", x), ("k", z), ("q", x), ("q", x), ("k", x), ("v", z)):
        assert torch.allclose(getattr(grouped, name)(of), getattr(alone, name)(of), atol=1e-5)


def test_an_x_that_was_changed_is_another_x(computed):
    alone, grouped = make_pair()
    x = torch.randn(3, 24)
    grouped.q(x)
    x.mul_(2)
    assert torch.allclose(grouped.k(x), alone.k(x), atol=1e-5)
    assert len(computed) == 2


def test_results_without_a_graph_are_not_for_training(computed):
    _, grouped = make_pair()
    x = torch.randn(3, 24)
    with torch.no_grad():
        grouped.q(x)
    assert grouped.k(x).requires_grad
    grouped.q(x)
    grouped.eval()
    grouped.v(x)
    assert len(computed) == 3


def test_what_has_changed_is_computed_anew(computed):
    alone, grouped = make_pair()
    x = torch.randn(3, 24)
    grouped.q(x)
    for model in (alone, grouped):
        with torch.no_grad():
            model.k.lora_B.mul_(2)
        model.v.set_lora_alpha(3)
    assert torch.allclose(grouped.k(x), alone.k(x), atol=1e-5)
    grouped.q(x)
    grouped.v.set_lora_alpha(5)
    assert torch.allclose(grouped.v(x), alone.v(x) * 0 + grouped.v.to_linear()(x), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped.q(x).dtype is torch.bfloat16
    assert grouped.k(x).dtype is torch.float32


def test_inference_mode(computed):
    alone, grouped = make_pair()
    with torch.inference_mode():
        x = torch.randn(3, 24)
        assert torch.allclose(grouped(x), alone(x), atol=1e-5)


def test_a_graph_that_is_gone_is_not_given_out(computed):
    _, grouped = make_pair()
    x = torch.randn(3, 24)
    grouped.q(x).sum().backward()
    grouped.k(x).sum().backward()
    assert len(computed) == 2


def test_merged_layers_are_plain(computed):
    alone, grouped = make_pair()
    x = torch.randn(3, 24)
    wanted = alone(x)
    grouped.k.merge_()
    assert torch.allclose(grouped(x), wanted, atol=1e-5)
    grouped.k.unmerge_()
    assert torch.allclose(grouped(x), wanted, atol=1e-5)


def test_copies_have_groups_of_their_own():
    _, grouped = make_pair()
    twin = copy.deepcopy(grouped)
    assert twin.q.group is twin.v.group is not grouped.q.group
    assert twin.q.group.layers[0] is twin.q
    assert twin.state_dict().keys() == grouped.state_dict().keys()


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiled_in_one_graph():
    alone, grouped = make_pair()
    x = torch.randn(3, 24)
    compiled = torch.compile(grouped, fullgraph=True, backend="eager")
    for _ in range(2):
        assert torch.allclose(compiled(x), alone(x), atol=1e-5)


@pytest.mark.parametrize(("change", "words"), [
    ({"in_features": 16}, "layers of a group must have one in_features, got .16, 24."),
    ({"lora_dropout": 0.5}, "layers of a group must have one lora_dropout, got .0.0, 0.5."),
    ({"dtype": torch.bfloat16}, "weights of one dtype"),
])  # fmt: skip
def test_layers_that_do_not_fit_together(change, words):
    options = {"in_features": 24, "out_features": 8, "r": 2}
    with pytest.raises(ValueError, match=words):
        LoRAGroup([LoRALinear(**options), LoRALinear(**(options | change))])


def test_replace_linear_finds_them():
    from fused_lora.pretrain.llama import Llama, LlamaConfig

    torch.manual_seed(0)
    model = Llama(LlamaConfig(16, 24, 2, 2, 40))
    tokens = torch.randint(40, (2, 7))
    twin = copy.deepcopy(model)
    targets = r".*\.(self_attn|mlp)\..*"
    report = replace_linear(model, 2, target_modules=targets)
    apart = replace_linear(twin, 2, target_modules=targets, fuse="off")
    assert (apart.groups, apart.mlps) == ([], [])
    names = [tuple(f"layers.{i}.self_attn.{name}_proj" for name in "qkv") for i in range(2)]
    assert report.groups == names
    assert report.mlps == ["layers.0.mlp", "layers.1.mlp"]
    assert f"  = {', '.join(names[0])}: together" in str(report)
    assert "  = layers.0.mlp: as one" in str(report)
    twin.load_state_dict(model.state_dict())
    assert torch.allclose(model(tokens), twin(tokens), atol=1e-5)
    (model(tokens).sum() + twin(tokens).sum()).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.grad is theirs.grad is None or torch.allclose(ours.grad, theirs.grad, atol=1e-4)


def test_only_what_was_replaced_is_grouped():
    from fused_lora.pretrain.llama import Llama, LlamaConfig

    model = Llama(LlamaConfig(16, 24, 1, 2, 40))
    report = replace_linear(model, 2, target_modules=["q_proj", "v_proj", "gate_proj", "up_proj"])
    assert report.groups == [
        ("layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"),
        ("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"),
    ]
    assert report.mlps == []
    with pytest.raises(ValueError, match="fuse must be one of auto, off, got 'on'"):
        replace_linear(model, 2, target_modules=["k_proj"], fuse="on")
