"""Pretraining on a text file: full-rank, LoRA or ReLoRA."""
