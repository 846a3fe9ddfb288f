"""Heads are left alone where nobody named them, in models of several libraries' kinds."""

import pytest
from torch import nn

from fused_lora import replace_linear

OPTIONS = dict(r=4, lora_alpha=6.0)
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32,
    "pad_token_id": 0,
}  # fmt: skip
WHISPER = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", ["lm_head", "head", "classifier", "score"])
def test_a_head_by_its_name(name):
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), name: nn.Linear(4, 9)})
    report = replace_linear(model, **OPTIONS)
    assert report.replaced == ["proj"]
    assert report.skipped == {name: "a head, which is adapted where target_modules names it"}
    assert model[name].weight.requires_grad, "it trains as it did"


def test_a_head_of_several_layers():
    head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 9))
    report = replace_linear(nn.ModuleDict({"headline": nn.Linear(4, 4), "classifier": head}), **OPTIONS)
    assert report.replaced == ["headline"]
    assert set(report.skipped) == {"classifier.0", "classifier.2"}


@pytest.mark.parametrize("targets", [["lm_head"], ".*head", ["proj", "lm_head"]])
def test_naming_a_head_targets_it(targets):
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "lm_head": nn.Linear(4, 9)})
    assert "lm_head" in replace_linear(model, target_modules=targets, **OPTIONS).replaced


class Named(nn.Module):
    """A language model whose head has a name of its own."""

    def __init__(self):
        super().__init__()
        self.proj, self.to_words = nn.Linear(4, 4), nn.Linear(4, 9)

    def get_output_embeddings(self):
        return self.to_words


def test_a_head_that_the_model_tells():
    assert replace_linear(Named(), **OPTIONS).replaced == ["proj"]
    assert replace_linear(nn.ModuleDict({"inner": Named()}), **OPTIONS).replaced == ["inner.proj"]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "heads"), [
    ("LlamaForCausalLM", {"lm_head"}),
    ("LlamaForSequenceClassification", {"score"}),
    ("BertForMaskedLM", {"cls.predictions.decoder", "cls.predictions.transform.dense"}),
    ("BertForSequenceClassification", {"classifier"}),
    ("RobertaForSequenceClassification", {"classifier.dense", "classifier.out_proj"}),
    ("BertForQuestionAnswering", {"qa_outputs"}),
    ("ViTForImageClassification", {"classifier"}),
    ("WhisperForConditionalGeneration", {"proj_out"}),
])  # fmt: skip
def test_heads_of_transformers(name, heads):
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**SIZES, **(WHISPER if name.startswith("Whisper") else {})))
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    report = replace_linear(model, **OPTIONS)
    assert linears - set(report.replaced) == heads
    assert heads <= set(report.skipped)


@pytest.mark.filterwarnings("default")
def test_a_base_model_has_no_head():
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel(transformers.BertConfig(**SIZES))
    assert replace_linear(model, **OPTIONS).skipped == {}
