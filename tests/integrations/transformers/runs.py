"""A small language model, batches of its own and a Trainer that takes them in order."""

import torch
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

STEPS, WARM_START, RESET_EVERY, ACCUMULATION, BATCH = 14, 2, 4, 2, 2
OPTIONS = {"reset_every": RESET_EVERY, "warm_start_steps": WARM_START, "r": 3, "lora_alpha": 5.0}
CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=1,
    num_hidden_layers=2, attention_dropout=0.1,
)  # fmt: skip


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def model_of(dtype=torch.float32, config=CONFIG):
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)
    model.accepts_loss_kwargs = False  # the loss of a step is then the mean of its micro-batches' on every version
    return model


def dataset(count=STEPS * ACCUMULATION * BATCH):
    tokens = torch.randint(32, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": each, "labels": each} for each in tokens]


def arguments(folder, **options) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 1e-2,
        "gradient_accumulation_steps": ACCUMULATION, "warmup_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "logging_steps": 3, "optim": "adamw_torch",
    }  # fmt: skip
    return TrainingArguments(**defaults | options)


def trainer_of(folder, callback, model=None, optimizers=(None, None), **options):
    model = model_of() if model is None else model
    args = arguments(folder, **options)
    args._n_gpu = min(args.n_gpu, 1)  # of several Trainer makes a DataParallel, and saves one's random numbers
    return InOrder(model, args, train_dataset=dataset(), callbacks=[callback], optimizers=optimizers)


def assert_equal(got, wanted):
    """The same bits in two models."""
    got, wanted = got.state_dict(), wanted.state_dict()
    assert got.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(got[name], wanted[name])]
    assert different == []
