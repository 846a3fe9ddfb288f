"""torch.library ops, their fakes and autograd."""

from .lora_group import lora_group
from .lora_linear import lora_linear
from .lora_mlp import lora_mlp
from .lora_segments import Adapter, Routed, lora_segments
from .lora_segments_mlp import lora_segments_mlp
from .merge import merge_
from .merge_and_reinit import merge_and_reinit_
from .parts import Part
from .row_norms import row_norms

__all__ = [
    "Adapter", "Part", "Routed", "lora_group", "lora_linear", "lora_mlp", "lora_segments",
    "lora_segments_mlp", "merge_", "merge_and_reinit_", "row_norms",
]  # fmt: skip
