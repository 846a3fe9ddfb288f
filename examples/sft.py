"""Supervised tuning with TRL and PEFT, and the same with one line more: accelerate(trainer.model).

    python -m examples.sft

A small LLaMA made from its configuration learns Python's documentation, by a LoRA on its linears and by its embeddings
and head, which are new and train whole. It does so twice, with the same losses up to rounding. A minute on two cores,
where plain torch computes both and nothing is gained; on a GPU the kernels take the second.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise

import torch

from fused_lora.extras import needs
from fused_lora.pretrain.python_text import language_reference

with needs("sft"):
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from fused_lora.integrations.peft import accelerate

VOCABULARY = 1024
UNTIMED_STEPS = 5  # these compile kernels and fill caches


@dataclass(frozen=True)
class Size:
    """Of the model and of its training."""

    hidden_size: int
    layers: int
    batch_size: int
    seq_len: int
    steps: int
    r: int


CPU = Size(hidden_size=128, layers=2, batch_size=4, seq_len=128, steps=60, r=16)
GPU = Size(hidden_size=2048, layers=8, batch_size=8, seq_len=1024, steps=60, r=16)


class Clock(TrainerCallback):
    """The moments at which steps end."""

    def __init__(self):
        self.moments: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.moments.append(time.perf_counter())

    def median_step(self) -> float:
        """Seconds."""
        return statistics.median(end - start for start, end in pairwise(self.moments[UNTIMED_STEPS - 1 :]))


def tokenizer_of(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the text itself."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], VOCABULARY, special_tokens=["<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<eos>")


def passages(text: str, size: Size) -> Dataset:
    """As many as the steps take, each longer than a sequence, which is cut to its length."""
    count, length = size.steps * size.batch_size, 8 * size.seq_len
    starts = torch.randint(len(text) - length, (count,), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"text": [text[start : start + length] for start in starts.tolist()]})


def model_of(size: Size) -> LlamaForCausalLM:
    """The same random weights each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden_size,
        intermediate_size=size.hidden_size * 11 // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden_size // 64,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16 if torch.cuda.is_available() else torch.float32)


def lora_of(size: Size) -> LoraConfig:
    return LoraConfig(
        r=size.r,
        lora_alpha=2 * size.r,
        target_modules="all-linear",
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )


def tune(size: Size, text: str, accelerated: bool) -> tuple[list[float], float]:
    """(the losses that were logged, tokens a second) of one run."""
    clock, on_gpu = Clock(), torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder,
            max_length=size.seq_len,
            max_steps=size.steps,
            per_device_train_batch_size=size.batch_size,
            learning_rate=2e-3,
            logging_steps=size.steps // 6,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            save_strategy="no",
            report_to="none",
        )
        trainer = SFTTrainer(
            model_of(size),
            args,
            train_dataset=passages(text, size),
            processing_class=tokenizer_of(text),
            peft_config=lora_of(size),
            callbacks=[clock],
        )
        if accelerated:
            accelerate(trainer.model)  # the one line
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, size.batch_size * size.seq_len / clock.median_step()


def main(size: Size | None = None) -> list[list[float]]:
    """Prints both runs side by side, and returns their losses."""
    size = size or (GPU if torch.cuda.is_available() else CPU)
    text = language_reference()
    (losses, speed), (our_losses, our_speed) = (tune(size, text, accelerated) for accelerated in (False, True))
    print(f"\n{'step':>8} {'PEFT':>10} {'accelerated':>12}")
    for i, (theirs, ours) in enumerate(zip(losses, our_losses, strict=True), 1):
        print(f"{i * (size.steps // 6):>8} {theirs:>10.4f} {ours:>12.4f}")
    print(f"{'tokens/s':>8} {speed:>10,.0f} {our_speed:>12,.0f}")
    return [losses, our_losses]


if __name__ == "__main__":
    main()
