"""The models of Hugging Face's whose training steps are timed, and the settings in which they are."""

from dataclasses import dataclass

from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config, PreTrainedConfig, Qwen3Config

R, LORA_ALPHA = 16, 32.0


@dataclass(frozen=True)
class Case:
    """A model by its shape, cut to some of its layers, and how many sequences of how many tokens a step has."""

    name: str
    config: PreTrainedConfig
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def __str__(self) -> str:
        layers = self.config.num_hidden_layers
        return f"{self.name}'s shapes, {layers} layers, {self.batch} x {self.length} tokens"


@dataclass(frozen=True)
class Setting:
    """How a model is trained."""

    dropout: float = 0.0
    checkpointing: bool = False
    compiled: bool = False


SETTINGS = {
    "eager": Setting(),
    "dropout 0.05": Setting(dropout=0.05),
    "checkpointing": Setting(checkpointing=True),
    "compiled": Setting(compiled=True),
}


def _case(name: str, kind: type[PreTrainedConfig], batch: int, length: int, *sizes: int, **more) -> Case:
    hidden, intermediate, heads, key_value_heads, layers = sizes
    config = kind(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
        num_key_value_heads=key_value_heads, num_hidden_layers=layers, vocab_size=32_000, max_position_embeddings=4096,
        use_cache=False, attn_implementation="sdpa", pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **more,
    )  # fmt: skip
    return Case(name, config, batch, length)


# Random weights and a vocabulary of 32,000: what is compared are the layers.
CASES = (
    _case("Llama-3-8B", LlamaConfig, 4, 2048, 4096, 14336, 32, 8, 8),
    _case("Qwen3-4B", Qwen3Config, 4, 2048, 2560, 9728, 32, 8, 12, head_dim=128),
    _case("Qwen3-0.6B", Qwen3Config, 8, 1024, 1024, 3072, 16, 8, 28, head_dim=128),
    _case("Gemma-3-4B", Gemma3TextConfig, 4, 2048, 2560, 10240, 8, 4, 12, head_dim=256),
    _case("Phi-3-mini", Phi3Config, 4, 2048, 3072, 8192, 32, 32, 12),
)
CPU_CASES = (_case("tiny", LlamaConfig, 2, 16, 64, 96, 4, 2, 2),)
