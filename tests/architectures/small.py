"""Small models of any class of transformers, built from its own configuration with its sizes made small."""

import inspect
import re

import torch
from torch import nn
from transformers import PreTrainedConfig

from .inputs import inputs_of

HIDDEN, HEADS, LAYERS, WORDS = 32, 4, 2, 96
# The size of a field by its name, the first that matches; None leaves it.
SIZES = [
    (r".*(dropout|eps|theta|factor|scal|std|prob|bias|token|_ids?$|idx|index_|interval|offset|stride).*", None),
    (r"(.*_)?vocab_size(_.*)?|(num|n)_(codes|codevectors.*)|max_words?_.*", WORDS),
    (r".*(key_value|kv)_heads|n_head_kv", HEADS // 2),
    (r"mamba_(n|num|d)_heads?|.*mamba_head_dim", 8),
    (r".*(head_dim|d_kv|head_size|head_width|kv_channels|d_head)", HIDDEN // HEADS),
    (r"(.*_)?heads?|(.*_)?(num|n)_heads?.*", HEADS),
    (r".*lora_rank", 16),
    (r"rotary_dim|kv_proj_dim", HEADS),
    (r".*groups?", 1),
    (r".*experts_per_to.*|(.*_)?(top_?k|topk|moe_k).*|num_selected_experts", 2),
    (r".*shared_experts?|first_k_dense.*", 1),
    (r".*experts?", 4),
    (r".*predict_layers|num_mtp.*", None),
    (r"(.*_)?(layers?|depth|num_blocks)", LAYERS),
    (r".*(intermediate|ffn|d_ff|n_inner|mlp_dim|feed_forward|inner_dim|ff_dim|d_inner|hidden_dim).*", 48),
    (r".*(hidden_size|d_model|n_embd|n_embed|embed_dim|embedding_size|emb_dim|model_dim|embedding_dim).*", HIDDEN),
    (r"dim|d_embed|hidden_channels|(encoder|decoder|adapter|text)_dim|word_embed_proj_dim|lru_width", HIDDEN),
    (r".*position.*|max_seq.*|n_ctx|max_(source|target)_.*|seq_length", 64),
    (r".*state_size|mamba_d_state|time_step_rank", 8),
    (r"image_size|input_size", 32),
    (r"attention_window|context_size", 8),
]  # fmt: skip
# As many heads of keys as of queries, which latent attention wants.
EQUAL_HEADS = [(r".*(key_value|kv)_heads|n_head_kv", HEADS), *SIZES]
# The widths as they are, where something depends on them.
FEW_LAYERS = [SIZES[0], SIZES[1], (r"(.*_)?(hidden_|encoder_|decoder_|n_|num_)?layers?", LAYERS)]
# Set whatever they are by default.
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
WHERE_NONE = {
    "vocab_size": WORDS, "head_dim": HIDDEN // HEADS, "num_key_value_heads": HEADS, "n_routed_experts": 4,
}  # fmt: skip
# What a configuration needs beside that.
OWN = {
    "ReformerModelWithLMHead": {"is_decoder": True},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "XmodForMaskedLM": {"default_language": "en_XX"},
}
# Which takes float64.
EAGER = {"experts_implementation": "eager", "attn_implementation": "eager"}
LARGEST = 20_000_000  # parameters


def small_model(cls) -> tuple[nn.Module, dict]:
    """One in evaluation whose forward runs, and its inputs; in float64 where it takes that. Raises the first of the
    reasons if no way to make it small works."""
    reasons = []
    for sizes in (SIZES, EQUAL_HEADS, FEW_LAYERS):
        for dtype in (torch.float64, torch.float32):
            try:
                return _try(cls, small_config(cls.config_class, sizes, OWN.get(cls.__name__)), dtype)
            except Exception as error:
                reasons.append(error)
    raise reasons[0]


def _try(cls, config: PreTrainedConfig, dtype: torch.dtype) -> tuple[nn.Module, dict]:
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    model = cls(config).to(dtype).eval()
    inputs = inputs_of(model, WORDS)
    model(**inputs)
    return model, inputs


def small_config(config_class, sizes, own=None) -> PreTrainedConfig:
    """The default configuration with other sizes, in the configurations inside it too."""
    default = config_class()
    stored = vars(default) | default.to_dict()
    names = [name for name in inspect.signature(config_class.__init__).parameters if name in stored]
    fields = {name: vars(default).get(name, stored[name]) for name in names}
    small = {name: _small(name, value, sizes) for name, value in fields.items()}
    changed = {name: value for name, value in small.items() if value is not fields[name]}
    return config_class(**changed | (own or {}), **EAGER)


def _small(name: str, value, sizes):
    if isinstance(value, PreTrainedConfig):
        return small_config(type(value), sizes)
    if name in TOKENS and not isinstance(value, list):
        return TOKENS[name]
    if value is None:
        return WHERE_NONE.get(name)
    size = next((size for pattern, size in sizes if re.fullmatch(pattern, name)), None)
    if type(value) is int and size is not None:
        return min(size, value)
    if name in ("depths", "layer_depths", "num_blocks") and isinstance(value, (list, tuple)):
        return type(value)(1 for _ in value)
    if name.startswith(("layer_types", "layers_block_type", "mlp_layer_types")) and value:
        return _some_of_each(value)
    return value


def _some_of_each(kinds: list) -> list:
    """As many as there are layers, of different kinds where there are several."""
    different = list(dict.fromkeys(kinds))
    return (different + different * LAYERS)[:LAYERS]
