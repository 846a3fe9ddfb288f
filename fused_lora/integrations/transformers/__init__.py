"""Transformers: ReLoRA in its Trainer, and in those that are made from it, such as TRL's SFTTrainer."""

from .callback import ReLoRACallback

__all__ = ["ReLoRACallback"]
