"""What the demo found, and how it prints and plots that."""

from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

import fused_lora
from fused_lora.explain import Explanation
from fused_lora.relora.spectrum import numerical_rank

from . import text
from .config import PROJECTION, DemoConfig
from .training import UNTIMED_STEPS, TrainingRun

FUSED_COLOR, UNFUSED_COLOR, BOUND_COLOR = "#f0a35e", "#1f3a5f", "#b3402a"


@dataclass(frozen=True)
class DemoResult:
    """What one demo found. Perplexities are per byte of held-out text; merge_difference is the largest between logits
    before and after the merge, logit_scale the largest logit. The spectra are the singular values of what LoRA and
    ReLoRA did to PROJECTION, whose longer side is longer_side."""

    fused: TrainingRun
    unfused: TrainingRun
    base_perplexity: float
    fused_perplexity: float
    unfused_perplexity: float
    merged_perplexity: float
    merge_difference: float
    logit_scale: float
    relora_perplexity: float
    lora_spectrum: Tensor
    relora_spectrum: Tensor
    longer_side: int

    @property
    def ranks(self) -> tuple[int, int]:
        """Numerical, of LoRA's and of ReLoRA's change."""
        return tuple(numerical_rank(values, self.longer_side) for values in (self.lora_spectrum, self.relora_spectrum))

    @property
    def loss_differences(self) -> Tensor:
        return (self.fused.losses - self.unfused.losses).abs()

    def disagreements(self, config: DemoConfig) -> list[str]:
        """A sentence for each bound that is exceeded; NaN exceeds every bound."""
        loss_difference = self.loss_differences.max().item()
        merge_difference = self.merge_difference / self.logit_scale
        found = []
        if not loss_difference <= config.max_loss_difference:
            found.append(
                f"the losses of the fused and the unfused run differ by up to {loss_difference:.2e} nats; "
                f"the bound is {config.max_loss_difference:g}"
            )
        if not merge_difference <= config.max_merge_difference:
            found.append(
                f"merging moved a logit by {merge_difference:.2e} of the largest logit; "
                f"the bound is {config.max_merge_difference:g}"
            )
        if not self.beyond(config.r) > 0:
            found.append(f"ReLoRA's change has no singular values beyond rank {config.r}")
        return found

    def beyond(self, r: int) -> float:
        """ReLoRA's singular value after the r-th as a fraction of the largest; 0 where that is rounding."""
        return (self.relora_spectrum[r] / self.relora_spectrum[0]).item() if self.ranks[1] > r else 0.0


def _heading(title: str) -> None:
    print(f"\n{title}\n{'-' * len(title)}")


def _parameters(model: nn.Module, trainable: bool) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def _dtype(config: DemoConfig) -> str:
    return str(config.dtype).removeprefix("torch.")


def _device(config: DemoConfig) -> str:
    if config.device.type == "cuda":
        return torch.cuda.get_device_name(config.device)
    return f"a CPU ({torch.get_num_threads()} threads)"


def print_setup(config: DemoConfig, train_tokens: int, held_out_tokens: int) -> None:
    """Versions, device, model and text."""
    llama = config.llama
    print(f"fused_lora {fused_lora.__version__}, torch {torch.__version__}, {_dtype(config)} on {_device(config)}")
    print(
        f"LLaMA: {llama.num_hidden_layers} layers, hidden {llama.hidden_size}, MLP {llama.intermediate_size}, "
        f"{llama.num_attention_heads} heads; LoRA: r={config.r}, lora_alpha={config.lora_alpha:g}"
    )
    print(
        f"text: {train_tokens:,} bytes to train on, {held_out_tokens:,} held out; a byte is a token; "
        f"{config.lora.batch_size} x {config.lora.seq_len} tokens a step"
    )


def print_layers(model: nn.Module, replaced: fused_lora.ReplaceReport, explanation: Explanation) -> None:
    """What replace_linear did and what fused_lora.explain says of one layer."""
    total, trainable = _parameters(model, trainable=False), _parameters(model, trainable=True)
    _heading("fused_lora.replace_linear")
    print(f"{str(replaced).splitlines()[0]}; {trainable:,} of {total:,} parameters train ({trainable / total:.1%})")
    _heading(f"fused_lora.explain, for {PROJECTION}")
    print(f"{explanation}\n")


def _memory(run: TrainingRun) -> str:
    return "not measured" if run.peak_memory is None else f"{run.peak_memory / 2**20:,.0f} MiB"


def _last_losses(run: TrainingRun) -> str:
    return f"{run.losses[-10:].mean().item():.4f}"


def print_results(result: DemoResult, explanation: Explanation) -> None:
    """The twins side by side, and what their speeds mean."""
    fused, unfused = result.fused, result.unfused
    rows = [
        ("", "fused", "unfused"),
        ("tokens/s", f"{fused.tokens_per_second:,.0f}", f"{unfused.tokens_per_second:,.0f}"),
        ("peak GPU memory", _memory(fused), _memory(unfused)),
        ("loss, mean of the last 10 steps", _last_losses(fused), _last_losses(unfused)),
        ("held-out perplexity, base model", f"{result.base_perplexity:.4f}", f"{result.base_perplexity:.4f}"),
        ("held-out perplexity, with LoRA", f"{result.fused_perplexity:.4f}", f"{result.unfused_perplexity:.4f}"),
        ("held-out perplexity, merged", f"{result.merged_perplexity:.4f}", ""),
        ("held-out perplexity, by ReLoRA", f"{result.relora_perplexity:.4f}", ""),
    ]
    _heading("results")
    for label, left, right in rows:
        print(f"{label:<34}{left:>14}{right:>14}")
    print(f"\nSpeed is that of the median step after the first {UNTIMED_STEPS}, which warm up; perplexity is per byte.")
    if explanation.backend == "reference":
        print(
            f"The fused layers ran in plain torch here ({explanation.reason}), so the two speeds say nothing about the "
            "kernels:\nthose need an NVIDIA GPU."
        )


def print_agreement(result: DemoResult, config: DemoConfig) -> None:
    """How far apart the twins' losses are at any step, and the logits before and after the merge."""
    loss, relative_loss = result.loss_differences, result.loss_differences / result.unfused.losses
    logit, relative_logit = result.merge_difference, result.merge_difference / result.logit_scale
    rows = [
        ("", "max", "mean", "bound"),
        (
            "loss, |fused - unfused| (nats)",
            f"{loss.max():.1e}",
            f"{loss.mean():.1e}",
            f"{config.max_loss_difference:g}",
        ),
        ("  as a fraction of the loss", f"{relative_loss.max():.1e}", f"{relative_loss.mean():.1e}", ""),
        ("logits, |merged - not merged|", f"{logit:.1e}", "", ""),
        ("  as a fraction of the largest", f"{relative_logit:.1e}", "", f"{config.max_merge_difference:g}"),
    ]
    _heading("agreement")
    for label, *values in rows:
        print(f"{label:<34}" + "".join(f"{value:>14}" for value in values))


def print_ranks(result: DemoResult, config: DemoConfig) -> None:
    """What restarts are for."""
    lora, relora = result.ranks
    _heading(f"the change of {PROJECTION}")
    print(f"LoRA, r={config.r}: numerical rank {lora} of {len(result.lora_spectrum)}")
    print(f"ReLoRA, {config.relora_cycles} cycles of r={config.r}: {relora}")
    print(f"ReLoRA's singular value {config.r + 1} is {result.beyond(config.r):.1%} of its largest")
    print("Restarts are for pretraining: in adapting a model they are no better than LoRA.")


def print_sample(prompt: Tensor, tokens: Tensor) -> None:
    """A held-out prompt and what the merged model makes of it."""
    _heading("the merged model goes on from a held-out prompt")
    print(f"{text.decode(prompt)}[...]{text.decode(tokens[len(prompt) :])}\n")


def _running_mean(losses: Tensor, window: int) -> Tensor:
    """(steps - window + 1,): the mean of each step and the window - 1 before it."""
    return losses.unfold(0, window, 1).mean(-1)


def _plot_losses(axes: Axes, result: DemoResult) -> None:
    """Every step, faint, and the running mean; the thin line lies on the thick one where the twins agree."""
    steps = torch.arange(1, len(result.fused.losses) + 1)
    window = max(1, len(steps) // 15)
    for run, label, color, width in (
        (result.fused, "fused (fused_lora)", FUSED_COLOR, 5.0),
        (result.unfused, "unfused (plain torch)", UNFUSED_COLOR, 1.4),
    ):
        axes.plot(steps, run.losses, color=color, linewidth=width / 3, alpha=0.25)
        axes.plot(steps[window - 1 :], _running_mean(run.losses, window), color=color, linewidth=width, label=label)
    axes.legend(frameon=False, title=f"mean of {window} steps; faint: each step")
    axes.set_ylabel("loss (nats per byte)")


def _plot_differences(axes: Axes, result: DemoResult, bound: float) -> None:
    """Dots on a logarithmic axis, on which a difference of zero has no place, and the bound."""
    steps = torch.arange(1, len(result.loss_differences) + 1)
    axes.semilogy(steps, result.loss_differences, ".", color=UNFUSED_COLOR, markersize=4)
    axes.axhline(bound, color=BOUND_COLOR, linestyle="--", linewidth=1.2)
    axes.text(
        1, bound, f"bound {bound:g} ", color=BOUND_COLOR, ha="right", va="bottom", transform=axes.get_yaxis_transform()
    )
    axes.margins(y=0.15)
    axes.set_ylabel("|fused - unfused|")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def save_loss_curves(result: DemoResult, config: DemoConfig, path: Path) -> None:
    """Both losses above, the size of their difference below."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=[2, 1])
    _plot_losses(above, result)
    _plot_differences(below, result, config.max_loss_difference)
    above.set_title(f"LoRA r={config.r}, fused and unfused: {_dtype(config)} on {_device(config)}", loc="left")
    _save(figure, (above, below), path)


def save_spectrum(result: DemoResult, config: DemoConfig, path: Path) -> None:
    """The singular values of LoRA's and ReLoRA's change, which ends at r and which does not."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for values, label, color in (
        (result.lora_spectrum, "LoRA", UNFUSED_COLOR),
        (result.relora_spectrum, f"ReLoRA, {config.relora_cycles} cycles", FUSED_COLOR),
    ):
        axes.semilogy(torch.arange(1, len(values) + 1), values, color=color, linewidth=2.2, label=label)
    axes.axvline(config.r, color=BOUND_COLOR, linestyle="--", linewidth=1.2, label=f"r = {config.r}")
    largest = result.relora_spectrum[0].item()
    axes.set_ylim(largest * 1e-7, largest * 3)
    axes.set_xlabel("index")
    axes.set_ylabel("singular value")
    axes.set_title(f"what training did to {PROJECTION}", loc="left")
    axes.legend(frameon=False)
    _save(figure, (axes,), path)


def _save(figure: Figure, every_axes: tuple[Axes, ...], path: Path) -> None:
    for axes in every_axes:
        axes.grid(axis="y", color="#e8e8e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")
