"""Wrapping and its reverse: what trains, what its user froze, what the optimizer holds, and blocks that were fused."""

import copy

import pytest
import torch
from torch import nn

from fused_lora import LoRALinear, replace_linear
from fused_lora.pretrain.llama import Llama, LlamaConfig
from fused_lora.relora import ReLoRA
from tests.relora.test_controller import OPTIONS, Net, Run

AT_ONCE = OPTIONS | {"warm_start_steps": 0}


@pytest.mark.parametrize("held", [True, False], ids=["held", "not held"])
@pytest.mark.parametrize("warm_start_steps", [0, 4])
def test_a_frozen_weight_is_not_trained_unasked(warm_start_steps, held):
    net = Net()
    net.mlp.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.AdamW([p for p in net.parameters() if held or p.requires_grad])
    options = OPTIONS | {"warm_start_steps": warm_start_steps}
    with pytest.raises(ValueError, match=r"mlp\.weight is frozen, and ReLoRA would train it: .*exclude_modules"):
        ReLoRA(net, optimizer, **options)
    assert type(net.attn) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    ReLoRA(net, optimizer, **options | {"exclude_modules": ["head", "mlp"]})


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_frozen_factor_is_not_begun_anew(part):
    net = Net()
    replace_linear(net, 3, lora_alpha=1.0, exclude_modules=["head"])
    getattr(net.mlp, part).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=rf"mlp\.{part} is frozen"):
        ReLoRA(net, optimizer, reset_every=3)


def test_a_weight_that_is_frozen_in_the_warm_start():
    run = Run()
    run.train(3)
    run.net.mlp.requires_grad_(False)
    state = len(run.optimizer.state)
    with pytest.raises(ValueError, match=r"mlp\.weight is frozen"):
        run.relora.step()
    assert (run.relora.steps, len(run.optimizer.state)) == (3, state)
    assert type(run.net.attn) is nn.Linear
    run.net.mlp.requires_grad_(True)
    run.train(1)
    assert isinstance(run.net.attn, LoRALinear)


@pytest.mark.parametrize("train_bias", [False, True])
@pytest.mark.parametrize("held", [True, False], ids=["held", "not held"])
def test_what_its_user_froze_stays_frozen_and_where_it_was(held, train_bias):
    """A bias of a linear that is wrapped, and another module's; the optimizer goes on holding what it held."""
    net = Net()
    for frozen in (net.attn.bias, net.head.weight):
        frozen.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if held or p.requires_grad], lr=0.01)
    relora = ReLoRA(net, optimizer, **AT_ONCE, train_bias=train_bias)
    before = net.attn.bias.clone(), net.head.weight.clone()
    for _ in range(7):
        net(torch.randn(4, 12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        relora.step()
    assert torch.equal(net.attn.bias, before[0])
    assert torch.equal(net.head.weight, before[1])
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all((id(frozen) in ids) == held for frozen in (net.attn.bias, net.head.weight))


def test_biases_that_go_on_training():
    frozen, trained = Run(), Run(train_bias=True)
    for run in (frozen, trained):
        run.train(4)
        before = run.net.attn.bias.clone()
        run.train(8)
        assert torch.equal(run.net.attn.bias, before) == (run is frozen)
    assert trained.optimizer.state[trained.net.attn.bias]["step"] == 8, "no factor: it does not restart"
    resumed = Run(train_bias=True)
    resumed.load(trained.save())
    for run in (resumed, trained):
        run.train(3)
    assert all(torch.equal(value, resumed.weights()[name]) for name, value in trained.weights().items())
    with pytest.raises(ValueError, match="the checkpoint has train_bias=True, this run False"):
        Run().relora.load_state_dict(trained.relora.state_dict())


def test_a_checkpoint_from_before_there_was_that_choice():
    run = Run()
    run.train(6)
    state = run.relora.state_dict()
    del state["options"]["train_bias"]
    Run().relora.load_state_dict(state)


def test_names_in_the_optimizer_follow_its_parameters():
    net = Net()
    optimizer = torch.optim.AdamW(net.named_parameters())
    relora = ReLoRA(net, optimizer, **AT_ONCE)
    names = ["attn.lora_A", "attn.lora_B", "mlp.lora_A", "mlp.lora_B", "head.weight", "head.bias"]
    assert optimizer.param_groups[0]["param_names"] == names
    own = dict(net.named_parameters())
    assert all(own[name] is p for name, p in zip(names, optimizer.param_groups[0]["params"], strict=True))
    relora.finish()
    assert optimizer.param_groups[0]["param_names"] == ["head.weight", "head.bias"]


def test_blocks_that_were_fused_are_what_they_were():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(16, 24, num_hidden_layers=2, num_attention_heads=2))
    types = [type(module) for module in model.modules()]
    names = list(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    relora = ReLoRA(model, optimizer, reset_every=4, r=3, exclude_modules=["lm_head"])
    assert relora.report.mlps
    tokens = torch.randint(256, (2, 9))
    for _ in range(2):
        model(tokens).square().mean().backward()
        optimizer.step()
        relora.step()
    wanted = model(tokens)
    relora.finish()
    assert [type(module) for module in model.modules()] == types
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(tokens), wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_under_two_names_and_one_that_is_the_model():
    torch.manual_seed(0)
    layer = LoRALinear(5, 5, 2)
    for model in (nn.Sequential(layer, nn.ReLU(), layer), layer):
        nn.init.normal_(layer.lora_B)
        relora = ReLoRA(model, torch.optim.SGD(model.parameters(), lr=0.1), reset_every=3)
        x = torch.randn(4, 5)
        wanted = model(x)
        plain = relora.finish()
        torch.testing.assert_close(plain(x), wanted)
        assert not any(isinstance(module, LoRALinear) for module in plain.modules())
    assert type(plain) is nn.Linear
