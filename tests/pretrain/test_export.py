"""A run's model in transformers: the same logits, generation, the tokenizer, and a folder that is whole or not."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from fused_lora.pretrain import export
from fused_lora.pretrain.merged import merged_weights, newest
from fused_lora.pretrain.run import CHECKPOINTS, TOKENIZER, Intervals, run
from fused_lora.reference import join

from . import problem

# The library warns of its own affairs.
pytestmark = pytest.mark.filterwarnings("default")


def trained(parts, output, steps=None, **changes):
    """A whole run, or one's first steps; its trainer."""
    trainer = problem.trainer(parts, **changes)
    if steps is None:
        run(trainer, parts, output, Intervals(4, 8, 8), resume=False)
        return trainer
    for _ in range(steps):
        trainer.step()
    trainer.save(output / CHECKPOINTS)
    return trainer


def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


TOKENS = torch.randint(300, (3, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("method", "steps"), [
    ("full", None), ("control", None), ("lora", None), ("relora", None), ("relora", 3), ("relora", 11),
])  # fmt: skip
def test_the_same_logits(parts, tmp_path, method, steps):
    """At the end of a run by every method, in a warm start, and within a cycle, whose update is merged."""
    trainer = trained(parts, tmp_path / "run", steps, method=method)
    model = loaded(export.export(tmp_path / "run", tmp_path / "out"))
    wanted = trainer.model.eval()(TOKENS)
    torch.testing.assert_close(model(TOKENS).logits, wanted, rtol=1e-4, atol=1e-5)
    assert type(model) is transformers.LlamaForCausalLM
    assert model.dtype is torch.float32


def test_numbers_of_the_config_that_are_not_usual(parts, tmp_path):
    llama = replace(problem.LLAMA, rope_theta=50.0, rms_norm_eps=0.3, num_attention_heads=4)
    trainer = trained(parts, tmp_path / "run", 2, model=llama, method="full")
    model = loaded(export.export(tmp_path / "run", tmp_path / "out"))
    torch.testing.assert_close(model(TOKENS).logits, trainer.model.eval()(TOKENS), rtol=1e-4, atol=1e-5)
    assert model.config.max_position_embeddings == problem.PRESET.seq_len


def test_bfloat16_with_its_low_halves(parts, tmp_path):
    """The run's own dtype, or float32, which is the weights as the run knows them: 16 bits are their rounding."""
    trainer = trained(parts, tmp_path / "run", 11, dtype=torch.bfloat16, lora_dropout=0.0)
    rounded = loaded(export.export(tmp_path / "run", tmp_path / "rounded"))
    exact = loaded(export.export(tmp_path / "run", tmp_path / "exact", "float32"))
    assert (rounded.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    trainer.relora.finish()
    for name, low in trainer.relora.lows.items():
        weight = trainer.model.get_submodule(name).weight
        assert low.any()
        ours = merged_weights(newest(tmp_path / "run" / CHECKPOINTS))[0][f"{name}.weight"]
        assert (ours - join(weight, low)).norm() <= 1e-6 * ours.norm()
    weights = rounded.state_dict()
    assert all(torch.equal(value.bfloat16(), weights[name]) for name, value in exact.state_dict().items())
    assert any(not torch.equal(value, weights[name].float()) for name, value in exact.state_dict().items())
    wanted = exact(TOKENS).logits
    theirs, ours = (logits.float() - wanted for logits in (rounded(TOKENS).logits, trainer.model.eval()(TOKENS)))
    assert theirs.norm() < 2 * ours.norm() < 0.1 * wanted.norm()


def test_generation_and_the_tokenizer(parts, tmp_path):
    trained(parts, tmp_path / "run")
    assert export.main([str(tmp_path / "run"), str(tmp_path / "deeper" / "out")]) == 0
    model = loaded(tmp_path / "deeper" / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "deeper" / "out")
    text = "to be or not to be"
    prompt = tokenizer(text, return_tensors="pt")
    assert prompt["input_ids"][0].tolist() == parts.tokenizer.encode(text).ids
    assert tokenizer.decode(prompt["input_ids"][0]) == text
    assert (tokenizer.eos_token, tokenizer.eos_token_id, len(tokenizer)) == ("<end>", 0, 300)
    words = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    own = prompt["input_ids"]
    for _ in range(words.shape[1] - own.shape[1]):
        own = torch.cat((own, model(own).logits[:, -1:].argmax(-1)), 1)
    assert words.shape[1] > prompt["input_ids"].shape[1]
    assert torch.equal(words, own)
    assert model.generate(max_new_tokens=3).shape[1] > 1, "from the token that ends documents"


def test_a_tokenizer_that_is_given_and_none(parts, tmp_path):
    trained(parts, tmp_path / "run", 2)
    assert not (tmp_path / "run" / TOKENIZER).exists()
    export.export(tmp_path / "run", tmp_path / "without")
    names = {path.name for path in (tmp_path / "without").iterdir()}
    assert names == {"model.safetensors", "config.json", "generation_config.json"}
    parts.tokenizer.save(str(tmp_path / "mine.json"))
    arguments = ["--tokenizer", str(tmp_path / "mine.json"), "--dtype", "float16"]
    assert export.main([str(tmp_path / "run"), str(tmp_path / "with"), *arguments]) == 0
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "with")("to be")["input_ids"]
    assert json.loads((tmp_path / "with" / "config.json").read_text())["torch_dtype"] == "float16"


def test_what_it_refuses(parts, tmp_path, capsys):
    trained(parts, tmp_path / "run", 2)
    (tmp_path / "out").mkdir()
    for run_folder, output, more, words in (
        ("run", "out", (), "out exists already"),
        ("nothing", "new", (), "checkpoints has no checkpoint"),
        ("run", "new", ("--tokenizer", str(tmp_path / "none.json")), "none.json"),
    ):
        assert export.main([str(tmp_path / run_folder), str(tmp_path / output), *more]) == 1
        assert words in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_a_folder_that_is_whole_or_not_there(parts, tmp_path, monkeypatch):
    trained(parts, tmp_path / "run", 2)
    seen = []
    real = export.write

    def dying(path, write):
        seen.append((tmp_path / "out").exists())
        if path.name == "generation_config.json":
            raise KeyboardInterrupt
        real(path, write)

    monkeypatch.setattr(export, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        export.export(tmp_path / "run", tmp_path / "out")
    assert seen == [False, False, False]
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_files_that_others_may_read(parts, tmp_path):
    trained(parts, tmp_path / "run", 2)
    out = export.export(tmp_path / "run", tmp_path / "out")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in out.iterdir()} == {(tmp_path / "plain" / "file").stat().st_mode}
