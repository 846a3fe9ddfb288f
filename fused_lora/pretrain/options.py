"""What a pretraining run is: a preset, a method, and the ingredients of ReLoRA that it has."""

from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..relora import JaggedCosine, ReLoRA
from .llama import LlamaConfig
from .presets import Preset

METHODS = ("full", "control", "lora", "relora")
WRAPPED = r".*\.(self_attn|mlp)\..*"  # embeddings, head and norms train whole throughout


@dataclass(frozen=True)
class Options:
    """One run; with the same options, text and number of ranks it gives the same weights bit for bit.

    * method: "full" trains every weight; "control" a smaller model with as many parameters as ReLoRA trains; "lora"
      and "relora" the factors after preset.warm_start_steps, without and with restarts every preset.reset_every steps.
    * base, precision: as ReLoRA's. reset: of the optimizer at restarts; jagged: the learning rate climbs after them.
    * reset_step: whether that resets Adam's step too; None leaves it to ReLoRA.
    * published: as in the paper's code, Adam's step survives a reset and the first step of a climb has a rate of 0.
    """

    preset: Preset
    method: str = "relora"
    base: str = "trained"
    precision: str = "auto"
    reset: bool = True
    jagged: bool = True
    published: bool = False
    reset_step: bool | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.reset_step and (self.published or not self.reset):
            raise ValueError("reset_step=True is not for published=True or reset=False, which keep Adam's step")
        self.schedule()

    @property
    def llama(self) -> LlamaConfig:
        return self.preset.control if self.method == "control" else self.preset.model

    @property
    def low_rank(self) -> bool:
        return self.method in ("lora", "relora")

    @property
    def reset_every(self) -> int | None:
        return self.preset.reset_every if self.method == "relora" else None

    @property
    def tokens_per_step(self) -> int:
        return self.preset.batch_size * self.preset.seq_len

    def schedule(self) -> JaggedCosine:
        """The factor of the learning rate; ValueError for numbers that do not fit together."""
        preset = self.preset
        return JaggedCosine(
            preset.total_steps,
            preset.warmup_steps,
            preset.restart_warmup_steps if self.low_rank else 0,
            self.reset_every if self.jagged else None,
            warm_start_steps=preset.warm_start_steps if self.low_rank else 0,
            published=self.published,
        )

    def relora(self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler) -> ReLoRA | None:
        """The controller of a run with factors."""
        if not self.low_rank:
            return None
        preset = self.preset
        return ReLoRA(
            model,
            optimizer,
            scheduler,
            reset_every=self.reset_every,
            warm_start_steps=preset.warm_start_steps,
            r=preset.r,
            lora_alpha=preset.lora_alpha,
            target_modules=WRAPPED,
            lora_dropout=preset.lora_dropout,
            lr_factor=preset.relora_learning_rate / preset.learning_rate,
            precision=self.precision,
            base=self.base,
            reset_ratio=preset.reset_ratio if self.reset else 0.0,
            reset_step=self.reset_step if self.reset and not self.published else False,
            seed=self.seed,
        )

    def flat(self) -> dict[str, str]:
        """Every number by its name, as words: what a checkpoint remembers of its run."""
        flat = asdict(self)
        preset = flat.pop("preset")
        return {name: str(value) for name, value in (flat | preset).items()}
