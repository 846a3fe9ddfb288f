"""An accelerated PeftModel: its restarts change the weights below its adapters, which checkpoints then hold too."""

import peft
import pytest
import torch
from transformers import LlamaForCausalLM

from fused_lora.integrations.peft import accelerate
from fused_lora.integrations.transformers import ReLoRACallback
from fused_lora.integrations.transformers import callback as callbacks

from .runs import assert_equal, model_of, trainer_of

pytestmark = pytest.mark.filterwarnings("default")


def run(folder, dtype, resume=None, **options):
    """(callback, PeftModel) after a run, whose trainer had the model before it was accelerated."""
    model = model_of(dtype)
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"))
    callback = ReLoRACallback(reset_every=4)
    trainer = trainer_of(folder, callback, model, label_names=["labels"], **options)
    accelerate(trainer.model)
    trainer.train(resume_from_checkpoint=resume)
    return callback, trainer.model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_bit_for_bit(dtype, tmp_path):
    callback, _ = run(tmp_path, dtype, save_strategy="steps", save_steps=1)
    whole = callback.finish()
    assert callback.relora.cycle == 4  # 14 steps: three restarts and the end
    for step in (3, 8, 9):
        again, _ = run(tmp_path, dtype, str(tmp_path / f"checkpoint-{step}"), max_steps=14)
        assert_equal(again.finish(), whole)


def test_the_model_below_it(tmp_path):
    """Its own class, with other weights than it began with, computing what the PeftModel computed."""
    callback, model = run(tmp_path / "run", torch.float32)
    assert isinstance(model, peft.PeftModel)
    tokens = torch.arange(8)[None]
    before = model.eval()(tokens).logits
    plain = callback.finish()
    torch.testing.assert_close(plain(tokens).logits, before)
    plain.save_pretrained(tmp_path / "plain")
    assert_equal(LlamaForCausalLM.from_pretrained(tmp_path / "plain"), plain)
    assert (plain.lm_head.weight == model_of().lm_head.weight).all()
    assert (plain.model.layers[0].mlp.up_proj.weight != model_of().model.layers[0].mlp.up_proj.weight).any()


def test_before_it_is_accelerated(tmp_path):
    model = peft.get_peft_model(model_of(), peft.LoraConfig(target_modules="all-linear"))
    trainer = trainer_of(tmp_path, ReLoRACallback(reset_every=4), model)
    with pytest.raises(ValueError, match="model has layers of PEFT: fused_lora"):
        trainer.train()


@pytest.mark.parametrize("options", [{}, {"r": 64, "lora_alpha": 99.0}])
def test_options_of_layers_that_are_not_used(options, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(callbacks.logger, "warning", lambda *words: said.append(words[0] % words[1:]))
    model = peft.get_peft_model(model_of(), peft.LoraConfig(r=3, target_modules="all-linear"))
    accelerate(model)
    trainer_of(tmp_path, ReLoRACallback(reset_every=4, **options), model, label_names=["labels"], max_steps=1).train()
    assert [text for text in said if "r, lora_alpha of the callback are not used" in text] == said[
        : 1 if options else 0
    ]


def test_a_layer_that_has_no_plain_update(tmp_path):
    model = peft.get_peft_model(model_of(), peft.LoraConfig(target_modules="all-linear", use_dora=True))
    accelerate(model)
    trainer = trainer_of(tmp_path, ReLoRACallback(reset_every=4), model)
    with pytest.raises(ValueError, match="q_proj is DoRA, whose gain a restart would leave behind"):
        trainer.train()
