"""torch.library ops, their fakes and autograd."""

from .lora_linear import lora_linear
from .merge import merge_

__all__ = ["lora_linear", "merge_"]
