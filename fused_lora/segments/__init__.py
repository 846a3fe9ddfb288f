"""Rows that choose their adapter: plans, the tables that kernels read, and what they mean in plain torch."""

from .formula import Drops, backward_ref, dxa_ref, forward_ref, lora_segments_ref, ranks_of
from .plan import BLOCK, BOX, SIZES, SLICE, Level, Place, Plan, Window, make_plan, size_of, window_of
from .tables import Constants, Tables, constants, on_device, tables

__all__ = [
    "BLOCK", "BOX", "SIZES", "SLICE", "Constants", "Drops", "Level", "Place", "Plan", "Tables", "Window",
    "backward_ref", "constants", "dxa_ref", "forward_ref", "lora_segments_ref", "make_plan", "on_device", "ranks_of",
    "size_of", "tables", "window_of",
]  # fmt: skip
