"""The main job: a LLaMA trained with fused LoRA beside its unfused twin, merged, compared, plotted.

    python -m examples.demo                 adapts to the Python language reference, which comes with Python
    python -m examples.demo --text PATH     adapts to a text of your own

The base model is first trained whole on the standard library's docstrings (a warm start: LoRA finds little to adapt in
random weights) and frozen. LoRA then adapts it to the text twice, from one start and on the same batches: once by
fused_lora and once by plain torch. ReLoRA adapts it once more, in four cycles with three restarts between them, and
merges each: a change whose rank is beyond LoRA's. Exits with status 1 if the two LoRAs disagree or the rank is not
beyond r. Writes demo_output/loss_curves.png and demo_output/spectrum.png.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from torch import Tensor

import fused_lora
from fused_lora.extras import needs
from fused_lora.pretrain import python_text
from fused_lora.pretrain.llama import Llama
from fused_lora.reference import join
from fused_lora.relora.spectrum import change_spectrum

from . import text
from .unfused import unfused_twin

with needs("demo"):
    from . import report
    from .config import PROJECTION, DemoConfig, cpu_config, gpu_config
    from .report import DemoResult
    from .training import TrainingRun, held_out_logits, perplexity, sample, train

TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_text(path: Path | None, config: DemoConfig) -> tuple[Tensor, Tensor]:
    """(train, held-out) tokens on the device: of the file, or of the language reference."""
    content = python_text.language_reference().encode() if path is None else path.read_bytes()
    tokens, held_out = text.split(text.encode(content).to(config.device))
    if len(held_out) <= config.lora.seq_len:
        raise ValueError(f"the text needs at least {10 * (config.lora.seq_len + 1):,} bytes, got {len(content):,}")
    return tokens, held_out[: config.held_out_tokens]


def warm_start(config: DemoConfig) -> Llama:
    """A base model trained whole on docstrings, then cast to config.dtype and frozen. While it trains, its weights are
    float32 under autocast: in 16 bits they would lose AdamW's small updates."""
    tokens = text.encode(python_text.docstrings().encode()).to(config.device)
    torch.manual_seed(0)
    model = Llama(config.llama).to(config.device)
    autocast = None if config.dtype is torch.float32 else config.dtype
    train(model, tokens, config.warm_start, "warm start, every weight", autocast)
    return model.to(config.dtype).requires_grad_(False)


def adapt(model: Llama, tokens: Tensor, held_out: Tensor, config: DemoConfig, title: str) -> tuple[TrainingRun, float]:
    """Trains the model's factors; the run and the held-out perplexity after it. The model is on the GPU in here only,
    so that the peak memory is its own."""
    model.to(config.device)
    run = train(model, tokens, config.lora, title)
    held_out_perplexity = perplexity(*held_out_logits(model, held_out, config.lora))
    model.to("cpu")
    return run, held_out_perplexity


def wrap(model: Llama, config: DemoConfig) -> fused_lora.ReplaceReport:
    """LoRALinear in the place of the model's projections. Over a 16-bit base the factors stay float32, as in PEFT."""
    return fused_lora.replace_linear(
        model, config.r, config.lora_alpha, TARGET_MODULES, lora_dropout=0.0, lora_dtype=torch.float32
    )


def adapt_by_restarts(start: Llama, tokens: Tensor, held_out: Tensor, config: DemoConfig) -> tuple[float, Tensor]:
    """ReLoRA over a copy of start: the held-out perplexity after the last merge, and the spectrum of the change."""
    model = copy.deepcopy(start).to(config.device)
    wrap(model, config)
    relora = train(model, tokens, config.relora, "ReLoRA", cycles=config.relora_cycles).relora
    weight = model.get_submodule(PROJECTION).weight
    if PROJECTION in relora.lows:  # of 16 bits: the rest of each weight is beside it
        weight = join(weight, relora.lows[PROJECTION])
    before = start.get_submodule(PROJECTION).weight.to(weight)
    return perplexity(*held_out_logits(model, held_out, config.relora)), change_spectrum(before, weight).cpu()


def update_spectrum(model: Llama) -> Tensor:
    """The singular values of LoRA's change."""
    layer = model.get_submodule(PROJECTION)
    change = layer.scale * layer.lora_B.detach() @ layer.lora_A.detach()
    return change_spectrum(torch.zeros_like(change), change).cpu()


def merge_and_compare(model: Llama, held_out: Tensor, config: DemoConfig) -> tuple[float, float, float]:
    """Merges every LoRALinear in place. (held-out perplexity after it, largest logit difference, largest logit)."""
    logits, targets = held_out_logits(model, held_out, config.lora)
    for module in model.modules():
        if isinstance(module, fused_lora.LoRALinear):
            module.merge_()
    merged, _ = held_out_logits(model, held_out, config.lora)
    return perplexity(merged, targets), (merged - logits).abs().max().item(), logits.abs().max().item()


def run_demo(config: DemoConfig, tokens: Tensor, held_out: Tensor, output: Path) -> DemoResult:
    """Trains, merges, compares, prints and plots; the caller judges by the result's disagreements."""
    report.print_setup(config, len(tokens), len(held_out))
    model = warm_start(config)
    base_perplexity = perplexity(*held_out_logits(model, held_out, config.lora))
    start = copy.deepcopy(model).to("cpu")

    replaced = wrap(model, config)
    explanation = fused_lora.explain(model.get_submodule(PROJECTION), tokens=config.lora.tokens_per_step)
    report.print_layers(model, replaced, explanation)
    twin = unfused_twin(model).to("cpu")
    fused, fused_perplexity = adapt(model, tokens, held_out, config, "fused LoRA")
    unfused, unfused_perplexity = adapt(twin, tokens, held_out, config, "unfused LoRA")
    lora_spectrum = update_spectrum(model)
    merged_perplexity, merge_difference, logit_scale = merge_and_compare(model.to(config.device), held_out, config)
    relora_perplexity, relora_spectrum = adapt_by_restarts(start, tokens, held_out, config)

    result = DemoResult(
        fused=fused,
        unfused=unfused,
        base_perplexity=base_perplexity,
        fused_perplexity=fused_perplexity,
        unfused_perplexity=unfused_perplexity,
        merged_perplexity=merged_perplexity,
        merge_difference=merge_difference,
        logit_scale=logit_scale,
        relora_perplexity=relora_perplexity,
        lora_spectrum=lora_spectrum,
        relora_spectrum=relora_spectrum,
        longer_side=config.llama.intermediate_size,
    )
    report.print_results(result, explanation)
    report.print_agreement(result, config)
    report.print_ranks(result, config)
    prompt = held_out[: config.lora.seq_len // 2]
    report.print_sample(prompt, sample(model, prompt, count=config.lora.seq_len, window=config.lora.seq_len))
    report.save_loss_curves(result, config, output / "loss_curves.png")
    report.save_spectrum(result, config, output / "spectrum.png")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a file to adapt to, instead of the Python language reference")
    arguments = parser.parse_args()
    # Bars go to stderr: through a pipe, too, the two streams stay in order.
    sys.stdout.reconfigure(line_buffering=True)
    config = gpu_config() if torch.cuda.is_available() else cpu_config()
    try:
        tokens, held_out = load_text(arguments.text, config)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    result = run_demo(config, tokens, held_out, Path("demo_output"))
    disagreements = result.disagreements(config)
    if disagreements:
        sys.exit("FAILED: " + "; ".join(disagreements))
    print(
        "OK: the fused and the unfused run agree, so do the models before and after the merge, "
        "and ReLoRA's change is of a higher rank than LoRA's"
    )


if __name__ == "__main__":
    main()
