"""ReLoRA in TRL's SFTTrainer, on a model of its user's and on the PeftModel that it makes."""

import pytest

pytest.importorskip("trl")

from trl import SFTConfig, SFTTrainer

from examples import sft
from fused_lora.integrations.peft import accelerate
from fused_lora.integrations.transformers import ReLoRACallback
from fused_lora.pretrain.python_text import language_reference

from .runs import assert_equal

pytestmark = pytest.mark.filterwarnings("default")

SIZE = sft.Size(hidden_size=64, layers=1, batch_size=2, seq_len=16, steps=8, r=4)


def run(folder, with_peft, resume=None, **options):
    """(callback, trainer) after a run."""
    text = language_reference()[:50_000]
    callback = ReLoRACallback(reset_every=3, **({} if with_peft else {"r": 4, "warm_start_steps": 2}))
    args = SFTConfig(
        str(folder), max_length=SIZE.seq_len, max_steps=SIZE.steps, per_device_train_batch_size=2, learning_rate=1e-2,
        use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_steps=5,
    )  # fmt: skip
    trainer = SFTTrainer(
        sft.model_of(SIZE),
        args,
        train_dataset=sft.passages(text, SIZE),
        processing_class=sft.tokenizer_of(text),
        peft_config=sft.lora_of(SIZE) if with_peft else None,
        callbacks=[callback],
    )
    if with_peft:
        accelerate(trainer.model)
    trainer.train(resume_from_checkpoint=resume)
    return callback, trainer


@pytest.mark.parametrize("with_peft", [False, True])
def test_it_trains_and_resumes(with_peft, tmp_path):
    callback, trainer = run(tmp_path, with_peft)
    assert (callback.relora.steps, callback.relora.cycle) == (8, 2 if with_peft else 3)
    assert "relora/cycle" in trainer.state.log_history[-1]
    again, _ = run(tmp_path, with_peft, str(tmp_path / "checkpoint-5"))
    assert_equal(again.finish(), callback.finish())
