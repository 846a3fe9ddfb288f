"""Training by restarts: the controller, the learning rate's schedule and the optimizer's reset."""

from .controller import ReLoRA
from .optimizer_reset import optimizer_reset
from .schedule import JaggedCosine, jagged_cosine_schedule

__all__ = ["JaggedCosine", "ReLoRA", "jagged_cosine_schedule", "optimizer_reset"]
