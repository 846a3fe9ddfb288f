"""TaskTrainer: the loop."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from .. import checks
from ..adapters import load_adapter, save_adapter
from ..adapters.layers import modules_of
from ..modules import LoRABank, adapter_parameters, add_adapter, delete_adapter, route
from ..modules.freezing import freeze_all_but_updates
from ..modules.protocol import is_bank
from ..relora.seeds import mix
from . import checkpoints
from .batches import Batch, Tokens, collate, next_token_losses, tokens_of
from .job import Job, Step
from .logs import Log
from .seeding import seeded
from .task import Task

ADAPTERS, LOGS, CHECKPOINTS = "adapters", "logs", "checkpoints"


class TaskTrainer:
    """Many tasks over one base in one loop, each with an adapter, an optimizer and data of its own.

        trainer = TaskTrainer(model, "runs")
        trainer.add(Task("law", sequences, {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}, 500, 2e-4))
        trainer.step()                          # a pass over the base for all tasks that run
        trainer.add(Task("german", ...))        # joins the others, with a first step of its own
        trainer.run()                           # until all have their steps

    In a pass the sequences of all tasks lie side by side, padded to the longest, a task's in one segment; in one
    backward pass all get the gradients of

        loss = sum over tasks of 1 / n_t (sum over the pass's labelled tokens of task t of -log p)

    with n_t the labelled tokens of the task's whole step, of `accumulate` passes. A task's factors, clipping, rate and
    AdamW are its own, so that it learns what it would alone: docs/adapters.md says up to what rounding. A task that has
    its steps ends, and the others go on. A step whose loss or gradient is no number is skipped; since it may spoil
    others' gradients of that pass, the pass is computed anew by halves, down to the task that it is of.

        folder          logs/<name>.jsonl, a line for each step; adapters/<name>, PEFT's files of tasks that have ended;
                        checkpoints/, the newest two, of all running tasks together. None: nothing is written
        loss            loss(model, batch) -> (sequences,): the sum over each one's labelled tokens; next_token_losses
        lora_dtype      of new banks, as in add_adapter
        save_every      passes, and there is a checkpoint when run() ends
        keep_adapters   whether the model keeps those of tasks that have ended
        progress        whether there is a bar for each running task
        resume          goes on from the folder's newest checkpoint, of the same base: tasks that it has, added again,
                        go on bit for bit where they were; those that had ended do nothing. Files of tasks that have not
                        begun there are written anew

    All of the model but adapters stops requiring gradients, and it is in training mode from the first pass on. What
    dropout drops depends on who else is in a pass, and not on what was drawn before.

    Raises ValueError or TypeError naming the argument.
    LoRA: Hu et al. 2021, arXiv:2106.09685. Many jobs over one base: Ye et al. 2023, arXiv:2312.02515 (ASPEN).
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike | None = None,
        loss: Callable[[nn.Module, Batch], Tensor] = next_token_losses,
        lora_dtype: torch.dtype | None = None,
        save_every: int = 100,
        keep_adapters: bool = True,
        progress: bool = True,
        resume: bool = False,
    ):
        checks.check_count("save_every", save_every, least=1)
        if resume and folder is None:
            raise ValueError("folder must be given to resume what is in it")
        self.model, self.folder, self.loss = model, None if folder is None else Path(folder), loss
        self.lora_dtype, self.save_every = lora_dtype, save_every
        self.keep_adapters, self.progress = keep_adapters, progress
        self.passes = 0
        self.ended: list[str] = []
        self._jobs: dict[str, Job] = {}
        self._logs: dict[str, Log] = {}
        self._waiting: dict[str, Path | None] = {}  # tasks of the checkpoint that were not added yet; None: had ended
        self._route: tuple[tuple, route] | None = None
        found = None if folder is None else checkpoints.newest(self.folder / CHECKPOINTS)
        if found is not None and not resume:
            raise ValueError(f"folder must have no checkpoints unless they are to be resumed, got {found}: resume=True")
        if found is not None:
            index = checkpoints.read_index(found)
            checkpoints.check_same(found, index, model, lora_dtype)
            self.passes = index["passes"]
            self._waiting = {name: found / name for name in index["running"]} | dict.fromkeys(index["ended"])

    # ---- which tasks run

    @property
    def running(self) -> list[str]:
        """In the order of their rows."""
        return sorted(self._jobs)

    @property
    def waiting(self) -> list[str]:
        """Those of the checkpoint that have not been added again."""
        return sorted(name for name, place in self._waiting.items() if place is not None)

    def add(self, task: Task) -> None:
        """From the next pass on. Raises ValueError or TypeError, with nothing changed, for a name that is taken, a
        config that banks do not serve, and where a checkpoint is of the same name and not of the same task."""
        if not isinstance(task, Task):
            raise TypeError(f"task must be a Task, got {type(task).__name__}")
        name = task.name
        if name in self._jobs or name in self.ended or self._has_adapter(name):
            raise ValueError(f"name must be new, got {name!r}, which a task or an adapter of the model has")
        tokens_of(task.data[0], f"{name}, sequence 0")
        if name not in self._waiting:
            self._begin(task)
        elif self._waiting[name] is not None:
            self._go_on(task, self._waiting[name])
        else:
            self._take_ended(name)
        self._waiting.pop(name, None)

    def remove(self, name: str) -> None:
        """Ends a task now, as if it had its steps; one that was not added again is left behind."""
        if name in self.waiting:
            del self._waiting[name]
        elif name in self._jobs:
            self._end(self._jobs[name])
        else:
            raise ValueError(
                f"name must be a running task ({', '.join(self.running) or 'there is none'}), got {name!r}"
            )

    def _banks(self) -> Iterator[tuple[str, LoRABank]]:
        return ((layer, module) for layer, module in modules_of(self.model).items() if is_bank(module))

    def _has_adapter(self, name: str) -> bool:
        return any(name in bank.adapters for _, bank in self._banks())

    def _begin(self, task: Task) -> None:
        """With the values of its seed, whatever else is in the model."""
        with seeded(self._device, task.seed):
            add_adapter(self.model, task.name, config=task.config, lora_dtype=self.lora_dtype, freeze=True)
        self._run(task, None)

    def _go_on(self, task: Task, place: Path) -> None:
        """From a checkpoint."""
        state = checkpoints.read_state(place, task.remembered(), self._device)
        self._load_adapter(task.name, place)
        self._run(task, state)

    def _take_ended(self, name: str) -> None:
        if self.keep_adapters:
            self._load_adapter(name, self._place(ADAPTERS, name))
        self.ended.append(name)

    def _load_adapter(self, name: str, place: Path) -> None:
        load_adapter(self.model, place, name, self.lora_dtype)
        freeze_all_but_updates(self.model)

    def _run(self, task: Task, state: dict | None) -> None:
        try:
            job = Job(task, adapter_parameters(self.model, task.name))
            if state is not None:
                job.load_state_dict(state)
            path = self._place(LOGS, f"{task.name}.jsonl")
            self._logs[task.name] = Log(task.name, path, job.steps, task.steps, self.progress)
        except BaseException:
            delete_adapter(self.model, task.name)
            raise
        self._jobs[task.name] = job

    def _end_all(self) -> None:
        for job in [job for job in self._jobs.values() if job.is_done]:
            self._end(job)

    def _end(self, job: Job) -> None:
        name = job.task.name
        if self.folder is not None:
            save_adapter(self.model, self._place(ADAPTERS, name), name)
        self._logs.pop(name).close(f"{job.steps} of {job.task.steps} steps")
        del self._jobs[name]
        self.ended.append(name)
        if not self.keep_adapters:
            delete_adapter(self.model, name)

    # ---- the loop

    def run(self) -> None:
        """Until all tasks have ended."""
        if not (self._jobs or self._waiting or self.ended):
            raise RuntimeError("no task runs: add one")
        while self._jobs or self.waiting:
            self.step()
        if self.folder is not None:
            self.save()

    def step(self) -> dict[str, Step]:
        """A pass: what the steps came to of those tasks whose steps it completes."""
        if self.waiting:
            raise RuntimeError(f"the checkpoint has {', '.join(self.waiting)} too: add them again, or remove them")
        if not self._jobs:
            raise RuntimeError("no task runs: add one")
        done = {}
        self._end_all()  # whose end failed before
        if not self._jobs:
            return done
        self.model.train()
        with seeded(self._device, mix(self.passes)):  # a resumed run drops what it would have dropped
            computed = self._computed([self._jobs[name] for name in self.running])
        for job, *found in computed:
            step = job.take(*found)
            if step is not None:
                done[job.task.name] = step
        self.passes += 1
        for name, step in done.items():  # behind the pass, which a log that cannot be written must not split
            self._logs[name].add(step)
        self._end_all()
        if self.folder is not None and self.passes % self.save_every == 0:
            self.save()
        return done

    def _computed(self, jobs: Sequence[Job]) -> list[tuple[Job, list[Tensor], float, Tensor, float]]:
        """What Job.take wants. The host waits for the device once, to read all numbers."""
        shares = [job.share() for job in jobs]
        sums = self._summed_losses(jobs, [sequences for sequences, _ in shares])
        losses = torch.stack([each.sum() * weight for each, (_, weight) in zip(sums, shares, strict=True)])
        factors = [factor for job in jobs for factor in job.parameters]
        found = torch.autograd.grad(losses.sum(), factors, allow_unused=True)
        if all(grad is None for grad in found):
            raise RuntimeError(
                "no task's loss depends on its factors: gradient checkpointing must be with use_reentrant=False, and "
                "loss must be made of the model's output"
            )
        grads = iter([torch.zeros_like(f) if g is None else g for f, g in zip(factors, found, strict=True)])
        totals = [job.with_accumulated([next(grads) for _ in job.parameters]) for job in jobs]
        norms = [get_total_norm(each) for each in totals]
        numbers = torch.stack([losses.detach(), torch.stack(norms).to(losses.dtype)]).tolist()
        if len(jobs) == 1 or all(map(math.isfinite, chain(*numbers))):
            return list(zip(jobs, totals, numbers[0], norms, numbers[1], strict=True))
        half = len(jobs) // 2
        return self._computed(jobs[:half]) + self._computed(jobs[half:])

    def _summed_losses(self, jobs: Sequence[Job], sequences: Sequence[list[Tokens]]) -> tuple[Tensor, ...]:
        """Of each task's sequences."""
        counts = [len(each) for each in sequences]
        batch = collate(list(chain(*sequences)), self._device)
        names = [job.task.name for job, count in zip(jobs, counts, strict=True) for _ in range(count)]
        with self._routed(names, batch.input_ids.shape[1]):
            sums = self.loss(self.model, batch)
        if sums.shape != (len(names),):
            raise ValueError(f"loss must give one number for each of {len(names)} sequences, got {tuple(sums.shape)}")
        return sums.split(counts)

    def _routed(self, names: list[str], T: int) -> route:
        """The last one, where batches of one kind follow one another and no layer has become a bank: to make one takes
        the host some milliseconds, and one for all lengths would keep the tables of each that it met."""
        key = (*names, T, sum(map(is_bank, self.model.modules())))
        if self._route is None or self._route[0] != key:
            self._route = key, route(self.model, names)
        return self._route[1]

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    # ---- files

    def _place(self, *parts: str) -> Path | None:
        return None if self.folder is None else self.folder.joinpath(*parts)

    def save(self) -> None:
        """A checkpoint of all running tasks, whole or not at all whenever the process is killed. It must not happen
        while tasks of the last one wait to be added."""
        if self.folder is None or self.waiting:
            raise RuntimeError(f"cannot save: {'tasks wait to be added' if self.waiting else 'there is no folder'}")
        ended = [*self.ended, *self._waiting]
        index = {
            "passes": self.passes, "running": self.running, "ended": ended, "lora_dtype": str(self.lora_dtype),
            "base": checkpoints.marks(dict(self._banks())),
        }  # fmt: skip
        fill = {name: lambda path, name=name: self._write(path, name) for name in self.running}
        checkpoints.save(self.folder / CHECKPOINTS, index, fill)

    def _write(self, place: Path, name: str) -> None:
        save_adapter(self.model, place, name)
        checkpoints.write_state(place, self._jobs[name].state_dict())
