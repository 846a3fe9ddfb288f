"""Small models with adapters of PEFT, trained a little by chance, and what PEFT makes of them."""

import copy

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

R, ALPHA = 3, 4.5
LLAMA = LlamaConfig(
    vocab_size=32, hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=1,
    num_hidden_layers=2,
)  # fmt: skip
QWEN3 = Qwen3Config(
    vocab_size=32, hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=1, head_dim=8,
    num_hidden_layers=2,
)  # fmt: skip
GPT2 = GPT2Config(
    vocab_size=32, n_embd=24, n_head=3, n_layer=2, n_positions=16, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0
)


class Net(nn.Module):
    """Two linears, one of which has no bias."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(9, 13), nn.Linear(13, 5, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def config_of(**options) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": ["up", "down"], **options})


def randomised(model: nn.Module, seed: int = 1) -> nn.Module:
    """B and its bias away from zero, and DoRA's magnitudes from the norms."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3
        if "magnitude" in name:
            parameter.data *= 0.5 + torch.rand(parameter.shape, generator=generator).to(parameter)
    return model


def adapted(base: nn.Module, config: peft.LoraConfig, **options) -> nn.Module:
    return randomised(peft.get_peft_model(base, config, **options))


def net(dtype=torch.float64, adapters=None, **options) -> nn.Module:
    """Net with an adapter, whose factors have a dtype of their own if given."""
    torch.manual_seed(0)
    model = adapted(Net().to(dtype), config_of(**options), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapters or dtype)
    return model


def language_model(config, **options) -> nn.Module:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).double()
    return adapted(base, config_of(**{"target_modules": "all-linear", **options}), autocast_adapter_dtype=False)


def twin_of(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def results(model: nn.Module, *args, **kwargs) -> dict[str, torch.Tensor]:
    """The output, and the gradients of a fixed sum of it by name, that of a floating-point input too."""
    model.zero_grad()
    args = [arg.detach().clone().requires_grad_() if arg.is_floating_point() else arg for arg in args]
    y = model(*args, **kwargs)
    y = getattr(y, "logits", y)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    (y * weights).sum().backward()
    found = {"y": y.detach()} | {f"input {i}": arg.grad for i, arg in enumerate(args) if arg.grad is not None}
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict, wanted: dict, tolerance: float) -> None:
    """To within a part of each tensor's largest entry; 0 for the same bits."""
    assert got.keys() == wanted.keys()
    for name, want in wanted.items():
        assert got[name].dtype == want.dtype, name
        size = want.abs().max().item()
        error = (got[name] - want).abs().max().item()
        assert error <= tolerance * max(size, 1e-30), f"{name}: off by {error:.1e} of {size:.1e}"
