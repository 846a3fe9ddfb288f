"""Losses of a PeftModel in training, as it is and accelerated, beside what another order of summation changes.

    python -m bench.losses [--steps 200]

A LLaMA of random weights learns English by its LoRA alone, three times from the same start with the same batches: by
PEFT, by PEFT with the hidden units in another order, which exact numbers would not notice, and accelerated.
"""

import argparse
from dataclasses import dataclass

import peft
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from fused_lora.integrations.peft import accelerate
from fused_lora.pretrain.python_text import language_reference

WITH_LINES = argparse.RawDescriptionHelpFormatter
STEPS = 200
LEARNING_RATE = 3e-4
VOCABULARY = 128  # of a text in ASCII
READERS = ("embed_tokens", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")  # columns are hidden units
WRITERS = ("o_proj", "down_proj")  # rows are


@dataclass(frozen=True)
class Size:
    """Of the model and of its batches."""

    hidden_size: int
    layers: int
    batch_size: int
    seq_len: int
    r: int


CPU = Size(hidden_size=64, layers=2, batch_size=4, seq_len=64, r=4)
GPU = Size(hidden_size=1024, layers=8, batch_size=8, seq_len=512, r=16)


def batches_of(size: Size, steps: int, device: torch.device) -> Tensor:
    """(steps, batch_size, seq_len) letters, each sequence from somewhere in the text."""
    text = torch.tensor(bytearray(language_reference().encode("ascii", "ignore")), dtype=torch.int64)
    starts = torch.randint(len(text) - size.seq_len, (steps, size.batch_size, 1))
    return text[starts + torch.arange(size.seq_len)].to(device)


def model_of(size: Size, device: torch.device, in_float32: bool) -> peft.PeftModel:
    """The same each time; in_float32: the adapters, as PEFT has them by default."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=size.hidden_size, intermediate_size=size.hidden_size * 11 // 4,
        num_hidden_layers=size.layers, num_attention_heads=size.hidden_size // 64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device, torch.bfloat16)
    lora = peft.LoraConfig(r=size.r, lora_alpha=2 * size.r, target_modules="all-linear")
    return peft.get_peft_model(model, lora, autocast_adapter_dtype=in_float32)


@torch.no_grad()
def reordered(model: peft.PeftModel) -> peft.PeftModel:
    """The same function: products and norms add up their hidden units in another order."""
    order = torch.randperm(model.config.hidden_size)
    for name, parameter in model.named_parameters():
        if any(part in name for part in READERS) and "lora_B" not in name:
            parameter.data = parameter.data[:, order]
        if any(part in name for part in WRITERS) and "lora_A" not in name:
            parameter.data = parameter.data[order]
    return model


def losses_of(model: peft.PeftModel, batches: Tensor, name: str) -> Tensor:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    losses = []
    for batch in tqdm(batches, name):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).double().cpu()


def compare(size: Size, device: torch.device, in_float32: bool, steps: int = STEPS) -> dict[str, Tensor]:
    """The losses of each way."""
    torch.manual_seed(1)
    batches = batches_of(size, steps, device)
    accelerated = model_of(size, device, in_float32)
    report = accelerate(accelerated)
    if report.kept:
        raise AssertionError(f"a layer is left to PEFT: {report}")
    return {
        "PEFT": losses_of(model_of(size, device, in_float32), batches, "PEFT"),
        "another order": losses_of(reordered(model_of(size, device, in_float32)), batches, "another order"),
        "accelerated": losses_of(accelerated, batches, "accelerated"),
    }


def table(losses: dict[str, Tensor]) -> list[str]:
    """Markdown rows: what each way's losses are, and how far they are from PEFT's."""
    theirs = losses["PEFT"]
    rows = []
    for name, own in losses.items():
        apart = (own - theirs).abs()
        rows.append(f"| {name} | {own[0]:.4f} | {own[-1]:.4f} | {apart.mean():.1e} | {apart.max():.1e} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.losses", description=__doc__, formatter_class=WITH_LINES)
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = GPU if device.type == "cuda" else CPU
    for in_float32 in (False, True):
        print(f"\n{steps} steps, bf16, adapters in {'fp32' if in_float32 else 'bf16'}\n", flush=True)
        losses = compare(size, device, in_float32, steps)
        print("| | first loss | last loss | mean distance from PEFT's | largest |\n|---|---|---|---|---|")
        print("\n".join(table(losses)), flush=True)


if __name__ == "__main__":
    main()
