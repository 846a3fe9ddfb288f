"""The paper's models and how it trained them, and small ones of the same kind."""

from dataclasses import dataclass, replace

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


def _llama(hidden: int, layers: int, heads: int, intermediate: int, vocab: int = 32_100) -> LlamaConfig:
    return LlamaConfig(hidden, intermediate, layers, heads, vocab, initializer_range=0.02)


_60M, _130M, _250M = _llama(512, 8, 8, 1376), _llama(768, 12, 12, 2048), _llama(768, 24, 16, 2560)
_350M, _1_3B = _llama(1024, 24, 16, 2736), _llama(2048, 24, 32, 5461)
# Lialin et al. 2023, arXiv:2307.05695, and the configurations published with it; the controls' widths of the MLP are
# not published.
_PAPER = {
    "60m": Preset(_60M, 256, 480, 1e-3, 1e-3, 500, 100, 1000, 10_000, 0, _llama(416, 8, 8, 1104)),
    "130m": Preset(_130M, 256, 600, 1e-3, 1e-3, 500, 100, 5000, 20_000, 5000, _llama(512, 12, 8, 1376)),
    "250m": Preset(_250M, 512, 1152, 5e-4, 1e-3, 500, 100, 5000, 20_000, 5000, _llama(640, 12, 10, 1712)),
    "350m": Preset(_350M, 512, 1152, 5e-4, 5e-4, 1000, 100, 5000, 20_000, 5000, _130M),
    "1.3b": Preset(_1_3B, 512, 1536, 4e-4, 8e-4, 1000, 100, 5000, 30_000, 10_000, _250M),
}
_TINY, _TINY_CONTROL = _llama(128, 2, 4, 352, 1024), _llama(96, 2, 4, 128, 1024)
_SMALL, _SMALL_CONTROL = _llama(512, 8, 8, 1376, 8192), _llama(352, 8, 8, 1024, 8192)
PRESETS = _PAPER | {
    # Minutes on two cores.
    "tiny": Preset(_TINY, 64, 16, 3e-3, 3e-3, 20, 10, 50, 300, 100, _TINY_CONTROL, r=16),
    # Minutes on one H100: the ordering of the paper's first table.
    "small": Preset(_SMALL, 256, 256, 1e-3, 1e-3, 100, 50, 500, 3000, 1000, _SMALL_CONTROL),
    # The 1.3B model at a width that every kernel likes.
    "1.3b-5504": replace(_PAPER["1.3b"], model=_llama(2048, 24, 32, 5504)),
}


def trainable_in_relora(preset: Preset) -> int:
    """Parameters that train after the warm start: the factors of a layer's 7 linears, embeddings, head and norms."""
    model, r = preset.model, preset.r
    hidden, intermediate = model.hidden_size, model.intermediate_size
    factors = 4 * r * (hidden + hidden) + 3 * r * (hidden + intermediate)
    norms = (2 * model.num_hidden_layers + 1) * hidden
    return model.num_hidden_layers * factors + 2 * model.vocab_size * hidden + norms
