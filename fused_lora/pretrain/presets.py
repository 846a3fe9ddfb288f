"""The paper's models and how it trained them, and small ones of the same kind."""

from dataclasses import dataclass, replace

from .. import checks
from .llama import LlamaConfig


@dataclass(frozen=True)
class Preset:
    """A model and its training: Adam (0.9, 0.999) without weight decay, gradients clipped at 1, cosine to a tenth."""

    model: LlamaConfig
    seq_len: int
    batch_size: int  # sequences a step
    learning_rate: float
    relora_learning_rate: float
    warmup_steps: int
    restart_warmup_steps: int
    reset_every: int
    total_steps: int
    warm_start_steps: int
    control: LlamaConfig  # a model with as many parameters as the low-rank phase trains
    r: int = 128
    lora_alpha: float = 32.0
    lora_dropout: float = 0.1
    reset_ratio: float = 0.99

    def __post_init__(self):
        for name in ("seq_len", "batch_size", "total_steps"):
            checks.check_count(name, getattr(self, name), least=1)
        for name in ("learning_rate", "relora_learning_rate"):
            checks.check_scale(name, getattr(self, name))
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


def _llama(hidden: int, layers: int, heads: int, intermediate: int, vocab: int = 32_100) -> LlamaConfig:
    return LlamaConfig(hidden, intermediate, layers, heads, vocab, initializer_range=0.02)


_60M, _130M, _250M = _llama(512, 8, 8, 1376), _llama(768, 12, 12, 2048), _llama(768, 24, 16, 2560)
_350M, _1_3B = _llama(1024, 24, 16, 2736), _llama(2048, 24, 32, 5461)
# Lialin et al. 2023, arXiv:2307.05695, and the configurations published with it; the controls' widths of the MLP are
# not published.
_PAPER = {
    "60m": Preset(
        _60M, control=_llama(416, 8, 8, 1104), seq_len=256, batch_size=480, learning_rate=1e-3,
        relora_learning_rate=1e-3, warmup_steps=500, restart_warmup_steps=100, reset_every=1000,
        total_steps=10_000, warm_start_steps=0,
    ),
    "130m": Preset(
        _130M, control=_llama(512, 12, 8, 1376), seq_len=256, batch_size=600, learning_rate=1e-3,
        relora_learning_rate=1e-3, warmup_steps=500, restart_warmup_steps=100, reset_every=5000,
        total_steps=20_000, warm_start_steps=5000,
    ),
    "250m": Preset(
        _250M, control=_llama(640, 12, 10, 1712), seq_len=512, batch_size=1152, learning_rate=5e-4,
        relora_learning_rate=1e-3, warmup_steps=500, restart_warmup_steps=100, reset_every=5000,
        total_steps=20_000, warm_start_steps=5000,
    ),
    "350m": Preset(
        _350M, control=_130M, seq_len=512, batch_size=1152, learning_rate=5e-4,
        relora_learning_rate=5e-4, warmup_steps=1000, restart_warmup_steps=100, reset_every=5000,
        total_steps=20_000, warm_start_steps=5000,
    ),
    "1.3b": Preset(
        _1_3B, control=_250M, seq_len=512, batch_size=1536, learning_rate=4e-4,
        relora_learning_rate=8e-4, warmup_steps=1000, restart_warmup_steps=100, reset_every=5000,
        total_steps=30_000, warm_start_steps=10_000,
    ),
}  # fmt: skip
PRESETS = _PAPER | {
    # A minute on two cores.
    "tiny": Preset(
        _llama(128, 2, 4, 352, 1024), control=_llama(96, 2, 4, 128, 1024), seq_len=64, batch_size=16,
        learning_rate=3e-3, relora_learning_rate=3e-3, warmup_steps=20, restart_warmup_steps=10, reset_every=50,
        total_steps=300, warm_start_steps=100, r=16,
    ),
    # Minutes on one H100: for the paper's first table.
    "small": Preset(
        _llama(512, 8, 8, 1376, 8192), control=_llama(352, 8, 8, 1024, 8192), seq_len=256, batch_size=256,
        learning_rate=1e-3, relora_learning_rate=1e-3, warmup_steps=100, restart_warmup_steps=50, reset_every=500,
        total_steps=3000, warm_start_steps=1000,
    ),
    # The 1.3B model at a width that every kernel likes.
    "1.3b-5504": replace(_PAPER["1.3b"], model=_llama(2048, 24, 32, 5504)),
}  # fmt: skip


def trainable_in_relora(preset: Preset) -> int:
    """Parameters that train after the warm start: the factors of a layer's 7 linears, embeddings, head and norms."""
    model, r = preset.model, preset.r
    hidden, intermediate = model.hidden_size, model.intermediate_size
    factors = 4 * r * (hidden + hidden) + 3 * r * (hidden + intermediate)
    norms = (2 * model.num_hidden_layers + 1) * hidden
    return model.num_hidden_layers * factors + 2 * model.vocab_size * hidden + norms
