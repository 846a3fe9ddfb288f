"""Runs of seconds: a text of a few words and a model of a few numbers."""

import random
from dataclasses import replace

import torch

from fused_lora.pretrain import data
from fused_lora.pretrain.llama import LlamaConfig
from fused_lora.pretrain.options import Options
from fused_lora.pretrain.presets import PRESETS
from fused_lora.pretrain.ranks import Ranks
from fused_lora.pretrain.trainer import Trainer

LLAMA = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=300)
PRESET = replace(
    PRESETS["tiny"], model=LLAMA, control=replace(LLAMA, hidden_size=8), seq_len=8, batch_size=4, warmup_steps=2,
    restart_warmup_steps=2, reset_every=4, total_steps=16, warm_start_steps=4, r=2,
)  # fmt: skip


def make_data(folder) -> data.Data:
    rng = random.Random(0)
    words = ["to", "be", "or", "not", "that", "is", "the", "question"]
    path = folder / "text.txt"
    path.write_text("\n\n".join(" ".join(rng.choices(words, k=12)) + f" {i}" for i in range(400)))
    return data.prepare(path, folder / "tokens", LLAMA.vocab_size)


def options(**changes) -> Options:
    """Of PRESET, with changes of either."""
    preset = {name: value for name, value in changes.items() if hasattr(PRESET, name)}
    return Options(replace(PRESET, **preset), **{name: v for name, v in changes.items() if name not in preset})


def trainer(parts: data.Data, device="cpu", micro_batch_size: int | None = None, compiled=False, **changes) -> Trainer:
    return Trainer(options(**changes), parts, Ranks(torch.device(device)), micro_batch_size, compiled)


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
