"""A small LLaMA with groups and fused MLPs, through what people do with a model: the same as with each layer alone."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn
from torch.func import functional_call
from torch.nn import functional as F

from fused_lora import LoRALinear, replace_linear

pytest.importorskip("transformers")
from tests.modules.language_model import adapted, base, grads, tokens

# transformers warns of its own affairs.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def fused(groups, as_one):
    """Says whether all blocks were computed as one since the last time."""

    def since():
        found = len(groups), len(as_one)
        groups.clear()
        as_one.clear()
        return found

    return since


BLOCKS = (2, 2)


def alone(**options):
    """The same model, layer by layer."""
    model = base()
    report = replace_linear(model, 3, 5.0, freeze=True, fuse="off", **options)
    model.load_state_dict(adapted(**options).state_dict())
    assert not report.groups
    return model


def test_saved_tensors_on_the_cpu(fused):
    wanted = grads(alone())
    with torch.autograd.graph.save_on_cpu():
        got = grads(adapted())
    torch.testing.assert_close(got, wanted)
    assert fused() == BLOCKS


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_train(way, fused):
    model = way(adapted())
    torch.testing.assert_close(grads(model), grads(alone()))
    assert fused() == BLOCKS


def test_a_copy_of_one_layer_is_one_layer(fused):
    attention = adapted().model.layers[0].self_attn
    attention(torch.randn(1, 4, 15), (torch.ones(1, 4, 6), torch.ones(1, 4, 6)), None)
    assert fused() == (1, 0)
    twin = copy.deepcopy(attention.q_proj)
    others = {id(tensor) for tensor in (*attention.k_proj.parameters(), *attention.v_proj.parameters())}
    assert not [value for value in vars(twin).values() if isinstance(value, nn.Module)]
    assert not others & {id(tensor) for tensor in twin.parameters()}
    own = sum(tensor.numel() * tensor.element_size() for tensor in attention.q_proj.parameters())
    assert len(pickle.dumps(twin)) < own + 4000


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_generated(mode, fused):
    prompt = tokens()[:, :3]
    with mode():
        got = adapted().eval().generate(prompt, max_new_tokens=5, do_sample=False)
    assert torch.equal(got, alone().eval().generate(prompt, max_new_tokens=5, do_sample=False))
    assert fused() == (2 * 5, 2 * 5)


def test_trained_after_inference(fused):
    model = adapted()
    with torch.inference_mode():
        model(tokens())
    torch.testing.assert_close(grads(model), grads(alone()))


def test_no_tokens(fused):
    for model in (adapted(), alone()):
        hidden = torch.zeros(0, 5, 15, requires_grad=True)
        model.model.layers[0].mlp(hidden).sum().backward()
        assert hidden.grad.shape == hidden.shape
        updates = [p for p in model.model.layers[0].mlp.parameters() if p.requires_grad]
        assert all(p.grad is not None and not p.grad.any() for p in updates)


def test_adapters_in_full_under_autocast(fused):
    """A 16-bit base, factors in float32, as PEFT has it."""
    found = []
    for make, dtype in ((alone, torch.float32), (alone, torch.bfloat16), (adapted, torch.bfloat16)):
        model = make(lora_dtype=torch.float32)
        for layer in model.modules():
            if isinstance(layer, LoRALinear):
                layer.weight.data = layer.weight.data.bfloat16().to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            found.append(grads(model))
    assert fused() == BLOCKS
    exact, apart, together = found
    for name, want in exact.items():
        assert together[name].dtype is torch.float32
        error, usual = (together[name] - want).norm(), (apart[name] - want).norm()
        assert error <= 2 * usual + 0.01 * want.norm(), name


def test_a_tied_head(fused):
    from transformers import LlamaForCausalLM

    from tests.modules.language_model import CONFIG

    config = copy.deepcopy(CONFIG)
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        wanted = model(tokens()).logits
    report = replace_linear(model, 3, 5.0, target_modules="all-linear")
    torch.testing.assert_close(model(tokens()).logits, wanted)
    assert "lm_head" not in report.replaced
    assert model.lm_head.weight is model.model.embed_tokens.weight


def updates_of(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_of(model, own, batch):
    logits = functional_call(model, own, (batch,), {"use_cache": False}).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def test_torch_func(fused):
    """Gradients by grad, and each sequence's own by vmap."""
    found = []
    for model in (adapted(), alone()):
        own = {name: parameter.detach() for name, parameter in updates_of(model).items()}
        loss = lambda own, batch, model=model: loss_of(model, own, batch)  # noqa: E731
        by_grad = torch.func.grad(loss)(own, tokens())
        each = [torch.func.grad(loss)(own, row[None]) for row in tokens()]
        mean = {name: (each[0][name] + each[1][name]) / 2 for name in own}
        torch.testing.assert_close(mean, by_grad)
        found.append(by_grad)
    torch.testing.assert_close(*found)


def test_vmap_over_samples(fused):
    mlps = [model.model.layers[0].mlp for model in (adapted(), alone())]
    x = torch.randn(4, 3, 15)
    found = []
    for mlp in mlps:
        own = {name: parameter.detach() for name, parameter in updates_of(mlp).items()}
        loss = lambda own, x, mlp=mlp: functional_call(mlp, own, (x,)).square().sum()  # noqa: E731
        found.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(own, x))
    torch.testing.assert_close(*found)


def test_symbolic_trace():
    mlp, x = adapted().model.layers[0].mlp, torch.randn(4, 15)
    traced = fx.symbolic_trace(mlp)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"][-1] == "down_proj"
    torch.testing.assert_close(traced(x), mlp(x))


def test_outputs_changed_in_place(fused):
    """Views of outputs too, as of heads that are split."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, 8) for _ in range(3))

        def forward(self, x):
            q, k, v = self.q(x), self.k(x), self.v(x)
            q.view(-1, 2, 4)[:, 0] += 1
            k *= 2
            heads = v.unflatten(-1, (2, 4)).transpose(0, 1)
            heads += 3
            return q * k * v

    together = nn.Sequential(Attention())
    apart = copy.deepcopy(together)
    found = []
    for model, fuse in ((together, "auto"), (apart, "off")):
        torch.manual_seed(1)
        replace_linear(model, 2, 3.0, fuse=fuse)
        for layer in model[0].children():
            nn.init.normal_(layer.lora_B)
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2), requires_grad=True)
        found.append(torch.autograd.grad(model(x).sum(), [x, *updates_of(model).values()]))
    assert fused() == (1, 0)
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_gradients_on_meta(fused):
    """Stages of a pipeline learn the shapes of what they pass on so."""
    model = adapted().to("meta")
    x = torch.empty(2, 9, 15, device="meta", requires_grad=True)
    model(inputs_embeds=x).logits.sum().backward()
    assert x.grad.is_meta
    assert x.grad.shape == x.shape
    for name, parameter in updates_of(model).items():
        assert parameter.grad.is_meta, name
        assert parameter.grad.shape == parameter.shape, name
    assert fused() == BLOCKS


def test_exported(fused):
    model = adapted().eval()
    program = torch.export.export(model, (tokens(),), {"use_cache": False})
    torch.testing.assert_close(program.module()(tokens(), use_cache=False).logits, alone().eval()(tokens()).logits)
    assert "fused_lora" not in str(program.graph)


@pytest.mark.parametrize("reentrant", [True, False])
def test_compiled_with_checkpointing_and_dropout(reentrant, fused):
    """The same seeds in the recomputation: the gradients are those of what was computed."""
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = adapted(lora_dropout=0.3).train()
        for block in model.model.layers if compiled else ():
            block.compile(backend="aot_eager")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        torch.manual_seed(5)
        found.append(grads(model))
    torch.testing.assert_close(*found)
