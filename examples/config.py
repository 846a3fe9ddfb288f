"""How large the demo is, on a CPU and on a GPU, and how closely its two runs must agree."""

from dataclasses import dataclass

import torch

from fused_lora.pretrain.llama import LlamaConfig

from .training import Schedule

PROJECTION = "layers.0.mlp.gate_proj"  # the layer that is explained and whose change is looked at


@dataclass(frozen=True)
class DemoConfig:
    """Model, schedules and bounds of one demo; the bounds decide its exit status."""

    device: torch.device
    dtype: torch.dtype
    llama: LlamaConfig
    r: int
    lora_alpha: float
    warm_start: Schedule
    lora: Schedule
    relora: Schedule
    relora_cycles: int
    held_out_tokens: int
    # Between the losses of the twins at any step, in nats.
    max_loss_difference: float
    # Between the logits before and after the merge, as a fraction of the largest logit.
    max_merge_difference: float


def cpu_config() -> DemoConfig:
    """A minute on two cores. In float32 the twins differ by the order of their sums alone."""
    return DemoConfig(
        device=torch.device("cpu"),
        dtype=torch.float32,
        llama=LlamaConfig(hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4),
        r=16,
        lora_alpha=32.0,
        warm_start=Schedule(steps=500, batch_size=8, seq_len=128, learning_rate=5e-3, seed=0),
        lora=Schedule(steps=300, batch_size=8, seq_len=128, learning_rate=3e-3, seed=1),
        relora=Schedule(steps=300, batch_size=8, seq_len=128, learning_rate=3e-3, seed=1),
        relora_cycles=4,
        held_out_tokens=16_384,
        max_loss_difference=1e-3,
        max_merge_difference=1e-4,
    )


def gpu_config() -> DemoConfig:
    """About a minute on a large GPU. In bfloat16 each twin rounds at places of its own, AdamW carries that on from step
    to step, and the merge rounds every weight to 8 bits once more: the bounds are some times what that amounts to."""
    return DemoConfig(
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        llama=LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16),
        r=64,
        lora_alpha=128.0,
        warm_start=Schedule(steps=300, batch_size=16, seq_len=512, learning_rate=6e-4, seed=0),
        lora=Schedule(steps=150, batch_size=16, seq_len=512, learning_rate=5e-4, seed=1),
        relora=Schedule(steps=160, batch_size=16, seq_len=512, learning_rate=5e-4, seed=1),
        relora_cycles=4,
        held_out_tokens=32_768,
        max_loss_difference=0.05,
        max_merge_difference=0.1,
    )
