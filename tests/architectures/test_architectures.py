"""Every architecture of transformers that builds small: its forward stays, its gradients are the merged model's."""

import importlib
import re

import pytest
import torch
import transformers
from torch import nn

from fused_lora import replace_linear

from .small import small_model

# The libraries that are converted warn of their own affairs.
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default"), pytest.mark.timeout(300)]
R, ALPHA = 3, 4.5
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}
TASKS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION", "CTC", "SPEECH_SEQ_2_SEQ")


def names_of_classes() -> list[str]:
    """Of the automatic mappings of all tasks."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    found = [name for task in TASKS for name in getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values()]
    flat = [each for name in found for each in ([name] if isinstance(name, str) else name)]
    return sorted(set(flat))


def made(name: str):
    """The model, a twin of it and their inputs, or a skip with the reason."""
    try:
        cls = getattr(transformers, name)
        tried, inputs = small_model(cls)
        gradients(tried, inputs)
        return *(fresh(tried) for _ in range(2)), inputs
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        pytest.skip(f"does not build small: {name}: {type(error).__name__}: {reason}")


def fresh(tried):
    """The same model before any forward, which can leave tensors that cannot be copied."""
    torch.manual_seed(0)
    model = type(tried)(tried.config).to(tried.dtype).eval()
    model.load_state_dict(tried.state_dict())
    return model


def results(model, inputs) -> list[torch.Tensor]:
    """Everything floating point that a forward gives, at its top."""
    torch.manual_seed(1)
    found = model(**inputs).to_tuple()
    return [each for each in found if isinstance(each, torch.Tensor) and each.is_floating_point()]


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    """By name, of every parameter and input that gets one, for a fixed sum of the results."""
    generator = torch.Generator().manual_seed(2)
    total = 0
    for result in results(model, inputs):
        if result.requires_grad:
            total = total + (result * torch.randn(result.shape, generator=generator, dtype=result.dtype)).sum()
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted |= {f"input {name}": x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {name: grad for name, grad in zip(wanted, found, strict=True) if grad is not None}


def assert_close(got, wanted, what):
    size = max(wanted.abs().max().item(), 1e-3) if wanted.numel() else 1.0
    error = (got - wanted).abs().max().item() if wanted.numel() else 0.0
    assert error <= TOLERANCE[wanted.dtype] * size, f"{what}: off by {error:.1e} of {size:.1e}"


@pytest.mark.parametrize("name", names_of_classes())
def test_an_architecture(name):
    model, merged, inputs = made(name)
    before = results(model, inputs)
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    report, said = replaced(model)
    assert all(f"\n  + {path}\n" in said or f"\n  - {path}: " in said for path in linears) or counts_all(said, linears)
    if report is None:
        return
    for got, wanted in zip(results(model, inputs), before, strict=True):
        assert_close(got, wanted, "forward at B = 0")
    layers = dict(zip(report.replaced, report.layers(model), strict=True))
    merge_random_updates(layers, merged)
    for got, wanted in zip(results(model, inputs), results(merged, inputs), strict=True):
        assert_close(got, wanted, "forward")
    check_gradients(gradients(model, inputs), gradients(merged, inputs), layers)


def counts_all(said, linears):
    """Of a refusal for one reason, which names one layer."""
    others = re.search(r": (\S+)(?: and (\d+) others)?: ", said)
    return others is not None and others[1] in linears and int(others[2] or 0) >= len(linears) - 1


def replaced(model):
    """The report, None where nothing can be replaced; and what was said."""
    try:
        report = replace_linear(model, r=R, lora_alpha=ALPHA)
    except ValueError as error:
        return None, f"{error}\n"
    return report, f"{report}\n"


def merge_random_updates(layers, merged):
    torch.manual_seed(3)
    for path, layer in layers.items():
        nn.init.normal_(layer.lora_B, std=0.1)
        merged.get_submodule(path).weight.data += ALPHA / R * layer.lora_B.detach() @ layer.lora_A.detach()


def check_gradients(ours, theirs, layers):
    """dA and dB follow from the merged weight's dW by the chain rule; every other gradient, dx's effect, is equal."""
    trained = 0
    for path, layer in layers.items():
        dW = theirs.pop(f"{path}.weight", None)
        theirs.pop(f"{path}.bias", None)  # frozen in ours
        dA, dB = (ours.pop(f"{path}.{factor}", None) for factor in ("lora_A", "lora_B"))
        assert (dA is None) == (dB is None) == (dW is None), path
        if dW is not None:
            trained += 1
            assert_close(dA, ALPHA / R * layer.lora_B.T @ dW, f"dA of {path}")
            assert_close(dB, ALPHA / R * dW @ layer.lora_A.T, f"dB of {path}")
    assert ours.keys() == theirs.keys()
    assert trained or len(layers) == 1, "no layer took part"  # SqueezeBERT's one linear is a pooler that is not called
    for name, grad in ours.items():
        assert_close(grad, theirs[name], f"gradient of {name}")
