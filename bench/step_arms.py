"""The ways to train a model's linears, and a model that is trained by one of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_lora import LoRALinear, replace_linear
from fused_lora.pretrain.llama import Llama, next_token_loss
from fused_lora.pretrain.ranks import accumulating

from .step_cases import FULL, Case
from .variants import FLOOR, PACKAGE, AddmmLoRA, unfused_formula

LINEARS = r".*\.(self_attn|mlp)\..*"
LORA_ALPHA = 32.0


class Unfused(nn.Module):
    """A frozen linear with factors, by a formula (x, weight, A, B, scale) -> y."""

    def __init__(self, linear: nn.Linear, r: int, scale: float, formula: Callable):
        super().__init__()
        N, K = linear.weight.shape
        self.weight, self.scale, self.formula = linear.weight.requires_grad_(False), scale, formula
        self.lora_A = nn.Parameter(self.weight.new_empty(r, K))
        self.lora_B = nn.Parameter(self.weight.new_empty(N, r))

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.weight, self.lora_A, self.lora_B, self.scale)


def _addmm(x: Tensor, *tensors) -> Tensor:
    return AddmmLoRA.apply(x.flatten(0, -2), *tensors).view(*x.shape[:-1], -1)


def with_formula(layers: nn.Module, r: int, scale: float, formula: Callable) -> None:
    """Replaces every nn.Linear by an Unfused."""
    for part in list(layers.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.Linear):
                setattr(part, name, Unfused(child, r, scale, formula))


def _model_with(formula: Callable) -> Callable:
    def convert(model: Llama, r: int) -> nn.Module:
        with_formula(model.layers, r, LORA_ALPHA / r, formula)
        return model

    return convert


def _with_peft(model: Llama, r: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=LORA_ALPHA, target_modules=LINEARS)
    trained = [parameter for name, parameter in model.named_parameters() if "layers." not in name or "norm" in name]
    # Adapters in the model's dtype: PEFT's default keeps them in float32, which is far slower.
    get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in trained:
        parameter.requires_grad_(True)
    return model


def _fused(model: Llama, r: int) -> nn.Module:
    # DistributedDataParallel takes padded weights, which are not the default where a process group is.
    replace_linear(model, r=r, lora_alpha=LORA_ALPHA, target_modules=LINEARS, pad_rows=True)
    return model


def freeze_linears(layers: nn.Module) -> None:
    """Weights of every nn.Linear; they have no biases."""
    for module in layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.requires_grad_(False)


def _frozen(model: Llama, r: int) -> nn.Module:
    freeze_linears(model.layers)
    return model


ARMS = {
    FULL: ("full-rank", lambda model, r: model),
    PACKAGE: ("**fused_lora**", _fused),
    "unfused": ("ReLoRA, unfused", _model_with(unfused_formula)),
    "addmm": ("ReLoRA, addmm", _model_with(_addmm)),
    "peft": ("PEFT", _with_peft),
    FLOOR: ("linears frozen, no adapter (the floor)", _frozen),
}


def factors(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """A and B of every linear that has them, in the model's order."""
    found = []
    for module in model.modules():
        if isinstance(module, LoRALinear | Unfused):
            found.append((module.lora_A, module.lora_B))
        elif isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            found.append((module.lora_A["default"].weight, module.lora_B["default"].weight))
    return found


@dataclass
class Arm:
    """A model with its loss, its optimizer and the micro-batches of a step."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    batches: list[tuple[Tensor, Tensor]]

    @classmethod
    def make(cls, case: Case, name: str, device: torch.device, compiled: bool, accumulate: int = 1) -> "Arm":
        """The same weights, factors and tokens for every arm of a case."""
        torch.manual_seed(0)
        with device:
            model = Llama(case.model).to(torch.bfloat16)
        model = ARMS[name][1](model, case.r)
        generator = torch.Generator(device).manual_seed(1)
        with torch.no_grad():
            for A, B in factors(model):
                A.normal_(std=A.shape[1] ** -0.5, generator=generator)
                B.normal_(std=0.02, generator=generator)
        if compiled:
            for block in model.layers:
                block.compile(fullgraph=name != "peft")
        if torch.distributed.is_initialized():
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
        shape = (case.batch, case.seq_len + 1)
        tokens = [
            torch.randint(case.model.vocab_size, shape, generator=generator, device=device) for _ in range(accumulate)
        ]
        loss = torch.compile(next_token_loss, fullgraph=True) if compiled else next_token_loss
        return cls(model, loss, optimizer, [(each[:, :-1], each[:, 1:]) for each in tokens])

    def gradients(self) -> Tensor:
        """Of all micro-batches; the last one's loss."""
        for i, (tokens, targets) in enumerate(self.batches):
            with accumulating(self.model, last=i == len(self.batches) - 1):
                loss = self.loss(self.model(tokens), targets)
                loss.backward()
        return loss

    def step(self) -> Tensor:
        loss = self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def results(self) -> dict[str, float]:
        """The loss, and the gradients' norms of the embedding and of all A and B, of a step that is not taken."""
        loss = self.gradients()
        model = getattr(self.model, "module", self.model)
        found = {"loss": loss.item(), "embedding's gradient": model.embed_tokens.weight.grad.float().norm().item()}
        for i, name in enumerate("AB"):
            grads = [pair[i].grad for pair in factors(model)]
            if grads:
                found[f"{name}'s gradients"] = torch.stack([grad.float().norm() for grad in grads]).norm().item()
        self.optimizer.zero_grad()
        return found

    def bytes_held(self) -> int:
        states = (value for state in self.optimizer.state.values() for value in state.values())
        tensors = [*self.model.parameters(), *self.model.buffers(), *(v for v in states if isinstance(v, Tensor))]
        if isinstance(self.model, DistributedDataParallel):  # whose buckets hold the gradients for good
            tensors += [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
