"""replace_linear on Hugging Face's models: blocks found by structure, the same numbers and the same training."""

import copy

import pytest
import torch

from fused_lora import replace_linear

transformers = pytest.importorskip("transformers")
# The libraries that are converted warn of their own affairs.
pytestmark = pytest.mark.filterwarnings("default")

SIZES = {
    "hidden_size": 32, "intermediate_size": 51, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
MODELS = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3Text"]
LINEARS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def make(name, **sizes):
    """A small causal language model of a family."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{'Gemma3Text' if name == 'Gemma3Text' else name}Config")(**(SIZES | sizes))
    model = {"Gemma3Text": "Gemma3"}.get(name, name)
    return getattr(transformers, f"{model}ForCausalLM")(config)


def convert(model, fuse, **options):
    torch.manual_seed(1)
    report = replace_linear(model, r=4, lora_alpha=8, target_modules=LINEARS, fuse=fuse, **options)
    for layer in report.layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return report


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_found_and_give_the_same(name, groups, as_one):
    fused = make(name)
    alone = copy.deepcopy(fused)
    report, apart = convert(fused, "auto"), convert(alone, "off")
    prefix = "model.layers"
    assert report.replaced == apart.replaced
    assert len(report.replaced) == 14
    assert report.mlps == [f"{prefix}.{i}.mlp" for i in range(2)]
    assert report.groups == [tuple(f"{prefix}.{i}.self_attn.{part}_proj" for part in "qkv") for i in range(2)]
    assert fused.state_dict().keys() == alone.state_dict().keys()
    tokens = torch.randint(1, 96, (2, 9))
    ours, theirs = (model(tokens, labels=tokens) for model in (fused, alone))
    assert (groups, len(as_one)) == ([3, 3], 2)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    ours.loss.backward()
    theirs.loss.backward()
    for (parameter_name, ours), theirs in zip(fused.named_parameters(), alone.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), parameter_name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def losses(model, device, steps):
    """Of training on sequences that count upwards."""
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    found = []
    for _ in range(steps):
        first = torch.randint(1, 32, (8, 1), generator=generator)
        tokens = (first + torch.arange(24)).to(device)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_losses_agree_over_200_steps(device):
    fused = make("Llama")
    alone = copy.deepcopy(fused)
    convert(fused, "auto")
    convert(alone, "off")
    ours, theirs = (losses(model.to(device), device, 200) for model in (fused, alone))
    assert ours[-20:].mean() < 0.9 * ours[:20].mean(), "it learns"
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
def test_losses_agree_in_bfloat16():
    fused = make("Llama", hidden_size=256, intermediate_size=683, head_dim=64).to("cuda", torch.bfloat16)
    alone = copy.deepcopy(fused)
    convert(fused, "auto")
    convert(alone, "off")
    ours, theirs = (losses(model, "cuda", 200) for model in (fused, alone))
    assert ours[-20:].mean() < 0.9 * ours[:20].mean(), "it learns"
    assert (ours[-20:].mean() - theirs[-20:].mean()).abs() < 0.03 * theirs[-20:].mean()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_gives_the_same():
    model = make("Llama")
    convert(model, "auto")
    tokens = torch.randint(1, 96, (2, 9))
    wanted = model(tokens).logits
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(tokens).logits, wanted, rtol=1e-4, atol=1e-5)


def seq2seq(name):
    """A small model whose decoder attends to its encoder, and its inputs."""
    torch.manual_seed(0)
    common = {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "vocab_size": 96,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0,
    }  # fmt: skip
    tokens = torch.randint(3, 96, (2, 7))
    if name == "Whisper":
        config = transformers.WhisperConfig(
            **common, num_mel_bins=8, max_source_positions=16, max_target_positions=16, decoder_start_token_id=1
        )
        return transformers.WhisperForConditionalGeneration(config), {
            "input_features": torch.randn(2, 8, 32), "decoder_input_ids": tokens,
        }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**common, max_position_embeddings=32)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    return model, {"input_ids": tokens, "decoder_input_ids": tokens}


@pytest.mark.parametrize("name", ["Whisper", "Bart", "Pegasus"])
def test_cross_attention_is_two_groups(name, groups):
    """The encoder's and the decoder's q, k and v; then q of the decoder's x, and k and v of the encoder's output."""
    fused, inputs = seq2seq(name)
    fused.eval()
    alone = copy.deepcopy(fused)
    targets = ["q_proj", "k_proj", "v_proj"]
    for model, fuse in ((fused, "auto"), (alone, "off")):
        torch.manual_seed(1)
        for layer in replace_linear(model, r=4, lora_alpha=1.0, target_modules=targets, fuse=fuse).layers(model):
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    ours, theirs = (model(**inputs, use_cache=False).logits for model in (fused, alone))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert sorted(groups) == [2, 3, 3]
    groups.clear()
    with torch.no_grad():
        options = {"max_new_tokens": 4, "do_sample": False, **{k: v for k, v in inputs.items() if k[:7] != "decoder"}}
        assert torch.equal(fused.generate(**options), alone.generate(**options))


def test_a_block_of_a_diffusers_transformer(groups):
    attention = pytest.importorskip("diffusers.models.attention")
    attention_processor = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(0)
    fused = attention.BasicTransformerBlock(dim=32, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=24)
    alone = copy.deepcopy(fused)
    for model, fuse in ((fused, "auto"), (alone, "off")):
        torch.manual_seed(1)
        report = replace_linear(model, r=4, lora_alpha=1.0, target_modules=["to_q", "to_k", "to_v"], fuse=fuse)
        for layer in report.layers(model):
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    x, text = torch.randn(2, 9, 32, requires_grad=True), torch.randn(2, 5, 24)
    grads = []
    for model in (fused, alone):
        y = model(x, encoder_hidden_states=text)
        grads.append(torch.autograd.grad(y.square().sum(), [x, *(p for p in model.parameters() if p.requires_grad)]))
    assert groups == [3, 2], "q, k and v of x; k and v of the text"
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    fused.attn1.set_processor(attention_processor.AttnProcessor())
    fused(x, encoder_hidden_states=text)
    assert groups == [3, 2, 2], "another processor was not read"
