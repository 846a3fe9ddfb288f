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
    r: int = 128
    lora_alpha: float = 32.0


def _llama(hidden: int, layers: int, heads: int, intermediate: int, vocab: int = 32_100) -> LlamaConfig:
    return LlamaConfig(hidden, intermediate, layers, heads, vocab, initializer_range=0.02)


# Lialin et al. 2023, arXiv:2307.05695, and the configurations published with it.
_PAPER = {
    "60m": Preset(_llama(512, 8, 8, 1376), 256, 480, 1e-3, 1e-3, 500, 100, 1000, 10_000, 0),
    "130m": Preset(_llama(768, 12, 12, 2048), 256, 600, 1e-3, 1e-3, 500, 100, 5000, 20_000, 5000),
    "250m": Preset(_llama(768, 24, 16, 2560), 512, 1152, 5e-4, 1e-3, 500, 100, 5000, 20_000, 5000),
    "350m": Preset(_llama(1024, 24, 16, 2736), 512, 1152, 5e-4, 5e-4, 1000, 100, 5000, 20_000, 5000),
    "1.3b": Preset(_llama(2048, 24, 32, 5461), 512, 1536, 4e-4, 8e-4, 1000, 100, 5000, 30_000, 10_000),
}
PRESETS = _PAPER | {
    # Minutes on two cores.
    "tiny": Preset(_llama(128, 2, 4, 352, 1024), 64, 16, 3e-3, 3e-3, 20, 10, 50, 300, 100, r=16),
    # Minutes on one H100: the ordering of the paper's first table.
    "small": Preset(_llama(512, 8, 8, 1376, 8192), 256, 256, 1e-3, 1e-3, 100, 50, 500, 3000, 1000),
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
