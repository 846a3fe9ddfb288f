"""The models whose training steps are timed."""

from dataclasses import dataclass, replace

from fused_lora.pretrain.llama import LlamaConfig
from fused_lora.pretrain.presets import PRESETS

from .variants import FLOOR

FULL = "full_rank"


@dataclass(frozen=True)
class Case:
    """A model of the paper, and how many sequences of how many tokens a micro-batch has; blocks: fewer than it has."""

    preset: str
    batch: int = 16
    seq_len: int = 512
    blocks: int | None = None

    @property
    def model(self) -> LlamaConfig:
        model = SEVEN_B if self.preset == "7b" else PRESETS[self.preset].model
        return replace(model, num_hidden_layers=self.blocks) if self.blocks else model

    @property
    def r(self) -> int:
        return 128 if self.preset == "7b" else PRESETS[self.preset].r

    @property
    def warm_start(self) -> float:
        """The share of the steps that train all weights, in the paper."""
        if self.preset == "7b":
            return 1 / 3
        return PRESETS[self.preset].warm_start_steps / PRESETS[self.preset].total_steps

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    def __str__(self) -> str:
        return f"{self.preset}, {self.batch} x {self.seq_len}" + (f", {self.blocks} blocks" if self.blocks else "")


SEVEN_B = LlamaConfig(4096, 11008, 32, 32, 32_000, initializer_range=0.02)
CASES = (
    Case("60m", 96), Case("130m", 64), Case("350m", 48), Case("1.3b"), Case("1.3b-5504"), Case("7b", blocks=4),
)  # fmt: skip
CPU_CASES = (Case("tiny", 4, 64),)


def flops(case: Case, arm: str) -> float:
    """Of a step: two for each multiplication, the lower half of attention, and nothing that is computed twice."""
    model, M = case.model, case.tokens
    hidden, wide = model.hidden_size, model.intermediate_size
    shapes = [(hidden, hidden)] * 4 + [(hidden, wide)] * 3
    linear = sum(K * N for K, N in shapes)
    low = sum(3 * case.r * (K + N) for K, N in shapes)
    products = {FLOOR: 2 * linear, FULL: 3 * linear}.get(arm, 2 * linear + low)
    attention = 3 * case.seq_len * hidden
    return 2 * M * (model.num_hidden_layers * (products + attention) + 3 * hidden * model.vocab_size)
