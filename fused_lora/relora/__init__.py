"""Training by restarts: the learning rate's schedule and the optimizer's reset."""

from .optimizer_reset import optimizer_reset
from .schedule import JaggedCosine, jagged_cosine_schedule

__all__ = ["JaggedCosine", "jagged_cosine_schedule", "optimizer_reset"]
