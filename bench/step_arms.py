"""The models whose training steps are timed, and the ways to train their linears."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fused_lora import LoRALinear, replace_linear
from fused_lora.pretrain.llama import Llama, LlamaConfig
from fused_lora.pretrain.presets import PRESETS

from .variants import AddmmLoRA, unfused_formula

LINEARS = r".*\.(self_attn|mlp)\..*"
LORA_ALPHA = 32.0
FLOOR, PACKAGE, FULL = "frozen", "fused_lora", "full_rank"


@dataclass(frozen=True)
class Case:
    """A model of the paper, and how many sequences of how many tokens a micro-batch has; blocks: fewer than it has."""

    preset: str
    batch: int = 16
    seq_len: int = 512
    blocks: int | None = None

    @property
    def model(self) -> LlamaConfig:
        model = SEVEN_B if self.preset == "7b" else PRESETS[self.preset].model
        return replace(model, num_hidden_layers=self.blocks) if self.blocks else model

    @property
    def r(self) -> int:
        return 128 if self.preset == "7b" else PRESETS[self.preset].r

    @property
    def warm_start(self) -> float:
        """The share of the steps that train all weights, in the paper."""
        if self.preset == "7b":
            return 1 / 3
        return PRESETS[self.preset].warm_start_steps / PRESETS[self.preset].total_steps

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    def __str__(self) -> str:
        return f"{self.preset}, {self.batch} x {self.seq_len}" + (f", {self.blocks} blocks" if self.blocks else "")


SEVEN_B = LlamaConfig(4096, 11008, 32, 32, 32_000, initializer_range=0.02)
CASES = (
    Case("60m", 96), Case("130m", 64), Case("350m", 48), Case("1.3b"), Case("1.3b-5504"), Case("7b", blocks=4),
)  # fmt: skip
CPU_CASES = (Case("tiny", 4, 64),)


def flops(case: Case, arm: str) -> float:
    """Of a step: two for each multiplication, the lower half of attention, and nothing that is computed twice."""
    model, M = case.model, case.tokens
    hidden, wide = model.hidden_size, model.intermediate_size
    shapes = [(hidden, hidden)] * 4 + [(hidden, wide)] * 3
    linear = sum(K * N for K, N in shapes)
    low = sum(3 * case.r * (K + N) for K, N in shapes)
    products = {FLOOR: 2 * linear, FULL: 3 * linear}.get(arm, 2 * linear + low)
    attention = 3 * case.seq_len * hidden
    return 2 * M * (model.num_hidden_layers * (products + attention) + 3 * hidden * model.vocab_size)


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
