"""Many LoRA trainings in one loop over one base."""

from .batches import Batch, next_token_losses
from .job import Step
from .task import Task
from .trainer import TaskTrainer

__all__ = ["Batch", "Step", "Task", "TaskTrainer", "next_token_losses"]
