"""The ways to train a Hugging Face model with adapters, and a model that is trained by one of them."""

import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fused_lora import replace_linear
from fused_lora.integrations.peft import accelerate

from .model_cases import LORA_ALPHA, Case, R, Setting
from .step_arms import Arm, factors
from .variants import FLOOR

# By parts of names: those of all decoders in the cases, Phi's fused ones too.
LINEARS = [
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj",
]  # fmt: skip


def _targets(model: nn.Module) -> list[str]:
    """Of LINEARS what the model has."""
    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [name for name in LINEARS if name in ends]


def _frozen(model: PreTrainedModel, dropout: float) -> nn.Module:
    return model


def _peft(in_float32: bool, accelerated: bool) -> Callable:
    def convert(model: PreTrainedModel, dropout: float) -> nn.Module:
        config = LoraConfig(r=R, lora_alpha=LORA_ALPHA, lora_dropout=dropout, target_modules=_targets(model))
        model = get_peft_model(model, config, autocast_adapter_dtype=in_float32)
        if accelerated:
            report = accelerate(model)
            if report.kept:
                raise AssertionError(f"a layer is left to PEFT: {report}")
        return model

    return convert


def _replaced(lora_dtype: torch.dtype | None) -> Callable:
    def convert(model: PreTrainedModel, dropout: float) -> nn.Module:
        replace_linear(
            model, r=R, lora_alpha=LORA_ALPHA, lora_dropout=dropout, lora_dtype=lora_dtype,
            target_modules=_targets(model),
        )  # fmt: skip
        return model

    return convert


ARMS = {
    FLOOR: ("frozen, no adapter (the floor)", _frozen),
    "peft": ("PEFT, adapters in bf16", _peft(False, accelerated=False)),
    "peft_fp32": ("PEFT's default, adapters in fp32", _peft(True, accelerated=False)),
    "accelerated": ("**PEFT accelerated**, adapters in bf16", _peft(False, accelerated=True)),
    "accelerated_fp32": ("**PEFT's default accelerated**", _peft(True, accelerated=True)),
    "replaced": ("**replace_linear**, adapters in bf16", _replaced(None)),
    "replaced_fp32": ("**replace_linear**, adapters in fp32", _replaced(torch.float32)),
}


class WithLoss(nn.Module):
    """A model's loss of tokens; gradients reach its first layer, as training with checkpoints has them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model.get_input_embeddings()(tokens).requires_grad_()
        return self.model(inputs_embeds=x, labels=tokens).loss


class ModelArm(Arm):
    """An Arm that keeps the losses of its steps."""

    losses: list[Tensor]

    def step(self) -> Tensor:
        loss = super().step()
        self.losses.append(loss)
        return loss


def base_of(case: Case, device: torch.device) -> PreTrainedModel:
    """The frozen model that all arms of a case share."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(case.config, dtype=torch.bfloat16)
    return model.requires_grad_(False).train()


def make(base: PreTrainedModel, case: Case, setting: Setting, name: str) -> ModelArm:
    """A model on the base's parameters, and the same factors and tokens for every arm."""
    model = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    model = ARMS[name][1](model, setting.dropout)
    device = next(base.parameters()).device
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for A, _ in factors(model):  # B is zero, as training begins
            A.copy_(torch.randn(A.shape, generator=generator, device=device) * A.shape[1] ** -0.5)
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    generator.manual_seed(2)
    tokens = torch.randint(case.config.vocab_size, (case.batch, case.length), generator=generator, device=device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    nothing = [nn.Parameter(torch.zeros((), device=device))]  # which an optimizer must have
    optimizer = torch.optim.AdamW(trained or nothing, lr=1e-4, fused=device.type == "cuda")
    with_loss = WithLoss(model)
    if setting.compiled:
        model.compile()
    arm = ModelArm(with_loss, lambda loss, _: loss, optimizer, [(tokens, tokens)])
    arm.losses = []
    return arm
