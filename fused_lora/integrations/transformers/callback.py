"""ReLoRACallback: the controller of fused_lora.relora at the places of Trainer's loop."""

import inspect
from pathlib import Path

from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import PartialState
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ...modules import ReplaceReport
from ...modules.selection import listed
from ...relora import JaggedCosine, ReLoRA
from ...relora.options import LORA, check_options
from ...relora.schedule import make_jagged
from ...relora.wrapping import check_model, lora_layers, wrap
from . import checkpoint
from .checkpoint import is_peft

logger = logging.get_logger(__name__)

# What Trainer gives the controller.
TRAINERS = ("model", "optimizer", "scheduler", "steps_scheduler", "state")
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA")


class ReLoRACallback(TrainerCallback):
    """ReLoRA in a transformers Trainer, or TRL's SFTTrainer:

        trainer = Trainer(model, args, train_dataset=data, callbacks=[ReLoRACallback(reset_every=1000, r=128)])
        trainer.train()  # or trainer.train(resume_from_checkpoint=True)
        trainer.save_model()  # a plain model again, which from_pretrained loads

    A plain model's linears become LoRALinear when the Trainer is made, or after `warm_start_steps`. A model that has
    such layers, or a PeftModel after fused_lora.integrations.peft.accelerate(trainer.model), trains with those.

    * reset_every and **options: those of fused_lora.relora.ReLoRA.
    * restart_warmup_steps: the schedule becomes the paper's jagged cosine, over all of Trainer's steps, with its
      learning_rate and warmup_steps, and climbs for so many steps after each restart, down to min_ratio at the end;
      lr_scheduler_type is not asked. By default Trainer's schedule stays, or the one that it was given.
    * Steps are optimizer steps. One that float16's loss scaling skips is none, for the restarts as for the schedule.
    * Checkpoints hold a file relora.pt: counters and the low halves of 16-bit weights, and of a PeftModel the weights
      below its adapters. One of them can be resumed with the same options, bit for bit on one device.
    * When training ends, the model becomes a plain one, all updates merged. A PeftModel stays one: finish() returns the
      model below it. `relora` is the controller, `report` what was replaced.
    * Log lines have "relora/cycle", and each restart makes one. Over weights in a format they have "relora/arrived":
      the share of the last update that arrived, of the layer with the least.

    Raises ValueError or TypeError naming the argument before anything is changed, when the Trainer is made: of options;
    of frozen or otherwise unfit linears; load_best_model_at_end and auto_find_batch_size, which bring back weights that
    the rest of the run has left; FSDP and DeepSpeed. When train() begins: a schedule that does not fit the restarts, a
    warm start under DDP, which is built once with the parameters that there are, a checkpoint that cannot be resumed.
    ReLoRA: Lialin et al. 2023, arXiv:2307.05695.
    """

    def __init__(
        self, *, reset_every: int | None, restart_warmup_steps: int | None = None, min_ratio: float = 0.1, **options
    ):
        given = [name for name in TRAINERS if name in options]
        if given:
            raise TypeError(f"{given[0]} is Trainer's to give")
        bound = inspect.signature(ReLoRA).bind(None, None, reset_every=reset_every, **options)
        bound.apply_defaults()
        self._options = {name: value for name, value in bound.arguments.items() if name not in TRAINERS}
        for name in ("target_modules", "exclude_modules"):
            self._options[name] = listed(self._options[name])
        check_options(**{name: self._options[name] for name in inspect.signature(check_options).parameters})
        self._of_layers = [name for name in LORA if name in options]
        self.restart_warmup_steps, self.min_ratio = restart_warmup_steps, min_ratio
        self.relora: ReLoRA | None = None
        self._model = self._optimizer = self._report = None

    @property
    def report(self) -> ReplaceReport | None:
        """What was replaced; None as long as nothing was, and for layers that the model came with."""
        return self._report or (self.relora.report if self.relora else None)

    def finish(self) -> nn.Module:
        """Merges what is left of a cycle, and returns the plain model; of a PeftModel, the one below it.

        Training's end does so for all but a PeftModel. Raises RuntimeError before train().
        """
        if self.relora is None:
            raise RuntimeError("there is no run to finish: call train() first")
        model = self.relora.finish()
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def on_init_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        _refuse(args)
        self._model, self._optimizer = model, optimizer
        if self._options["warm_start_steps"] == 0:
            self._wrap()
        else:
            # A checkpoint's weights come before the optimizer is made, and tell whether its warm start was over.
            self._hook = model.register_load_state_dict_pre_hook(self._wrap_as_saved)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        self._check_begin(args, model, lr_scheduler)
        saved = None
        if state.global_step > 0:
            named = [Path(str(args.resume_from_checkpoint))] if args.resume_from_checkpoint else []
            saved = checkpoint.load([*named, _folder(args, state)], model)
        if self.restart_warmup_steps is not None:
            make_jagged(lr_scheduler, self._jagged_cosine(args, state.max_steps))
        self.relora = ReLoRA(model, optimizer, lr_scheduler, **self._options, steps_scheduler=False, state=saved)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if not getattr(optimizer, "step_was_skipped", False) and self.relora.step() is not None:
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.relora is not None and not self.relora.finished:
            more = {"relora/cycle": self.relora.cycle}
            if self.relora.arrived:
                more["relora/arrived"] = min(each.share for each in self.relora.arrived.values())
            logs.update(more)
            state.log_history[-1].update(more)

    def on_save(self, args, state, control, model=None, **kwargs):
        if args.should_save:
            checkpoint.save(_folder(args, state), model, self.relora)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if is_peft(model):
            logger.warning("The PeftModel's own file would lack the merged updates: save what finish() returns.")
        else:
            self.finish()

    def _wrap(self) -> None:
        """Before the optimizer is made, unless it was given. What is PEFT's may still be accelerated."""
        if is_peft(self._model) or lora_layers(self._model):
            return
        lora = {name: self._options[name] for name in LORA}
        check_model(self._model, self._optimizer, lora, 0)
        self._report = wrap(self._model, self._optimizer, lora)

    def _wrap_as_saved(self, model, state_dict, *args) -> None:
        if any(name.endswith(".lora_A") for name in state_dict):
            self._wrap()

    def _check_begin(self, args: TrainingArguments, model: nn.Module, scheduler: LRScheduler) -> None:
        if self.relora is not None:
            raise RuntimeError("a ReLoRACallback is of one run: make the model, the Trainer and it anew")
        if model is not self._model:
            raise ValueError("Trainer must be made with its callback and its model: no add_callback, no model_init")
        if is_peft(model) and not lora_layers(model):
            raise ValueError("model has layers of PEFT: fused_lora.integrations.peft.accelerate(trainer.model) first")
        if self._of_layers and self._report is None and lora_layers(model):
            logger.warning("The model has its own layers: %s of the callback are not used.", ", ".join(self._of_layers))
        if self._options["warm_start_steps"] > 0:
            self._hook.remove()
            if args.world_size > 1 and not lora_layers(model):
                raise ValueError(
                    "warm_start_steps must be 0 under DDP, which is built once and would not see the factors: train "
                    "the warm start by a Trainer of its own"
                )
        if args.world_size > 1 and isinstance(scheduler, AcceleratedScheduler):
            raise ValueError("lr_scheduler must not be prepared by Accelerate, which steps it once for each process")

    def _jagged_cosine(self, args: TrainingArguments, total_steps: int) -> JaggedCosine:
        return JaggedCosine(
            total_steps,
            args.get_warmup_steps(total_steps),
            self.restart_warmup_steps,
            self._options["reset_every"],
            self.min_ratio,
            self._options["warm_start_steps"],
        )


def _refuse(args: TrainingArguments) -> None:
    """Raises ValueError for what of Trainer's would break a run."""
    if args.load_best_model_at_end:
        raise ValueError("load_best_model_at_end must be False: it brings back the weights of another cycle")
    if args.auto_find_batch_size:
        raise ValueError("auto_find_batch_size must be False: it begins anew with the weights of a run that failed")
    kind = PartialState().distributed_type.name
    if kind in SHARDED:
        raise ValueError(f"Trainer must run on one device or by DDP, not by {kind} (docs/relora.md has FSDP2's way)")


def _folder(args: TrainingArguments, state) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
