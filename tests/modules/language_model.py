"""A small LLaMA whose q, k and v are a group and whose MLPs are one, and what one step gives."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from fused_lora import LoRALinear, replace_linear
from fused_lora.modules import lora_mlp, protocol, siblings

# Widths that two ranks cannot halve.
CONFIG = LlamaConfig(
    vocab_size=61, hidden_size=15, intermediate_size=37, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=1, head_dim=6, max_position_embeddings=64,
)  # fmt: skip
FUSED = [3, "mlp", 3, "mlp"]  # what of it is computed together in a forward


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG)


def adapted(**options):
    model = base()
    report = replace_linear(model, 3, 5.0, freeze=True, **options)
    assert report.groups
    assert report.mlps
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_B, std=0.2)
    return model


def tokens(seed=1):
    return torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(seed))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def grads(model, seed=1):
    """Of one step from no gradients, by name: without the wrappers' part of it."""
    model.zero_grad()
    model(input_ids=tokens(seed), labels=tokens(seed)).loss.backward()
    return {
        name.removeprefix("module."): whole(parameter.grad).clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def watched():
    """Computes together, without kernels for it, whatever may be; the list of what was. For a process of its own."""
    seen, group, mlp = [], siblings.ops.lora_group, lora_mlp.ops.lora_mlp
    protocol.obstacle = lambda *args: None
    siblings.ops.lora_group = lambda x, parts, p: (seen.append(len(parts)), group(x, parts, p))[1]
    lora_mlp.ops.lora_mlp = lambda *args, **options: (seen.append("mlp"), mlp(*args, **options))[1]
    return seen
