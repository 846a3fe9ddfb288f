"""One LoRA linear with its inputs, the exact result in float64, torch's at the same dtype, and the kernels'."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fused_lora import backends, reference
from fused_lora.kernels.dropout import Dropout
from fused_lora.kernels.lora_linear import lora_linear_backward, lora_linear_forward
from fused_lora.kernels.tiles import KNOWN_GPUS, Gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RESULTS = ("y", "dx", "dA", "dB")


def gpus() -> dict[str, Gpu]:
    """The paths to test here: TMA as on Hopper, pointers as on Ampere (whose kernels run on Hopper too)."""
    paths = {"pointer": KNOWN_GPUS["RTX 3090"]}
    if DEVICE == "cpu" or backends.gpu(torch.device("cuda", 0)).has_tma:
        paths["tma"] = KNOWN_GPUS["H100"]
    return paths


def randn(*shape, dtype, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float32) * scale).to(device=DEVICE, dtype=dtype)


@dataclass
class Problem:
    x: torch.Tensor
    weight: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    bias: torch.Tensor | None
    dy: torch.Tensor
    scale: float = 0.3
    p: float = 0.0
    seed: int = 0x1234_5678_9ABC

    @classmethod
    def random(cls, M, K, N, r, dtype, lora_dtype=None, bias=True, p=0.0) -> "Problem":
        lora_dtype = lora_dtype or dtype
        return cls(
            randn(M, K, dtype=dtype),
            randn(N, K, dtype=dtype, scale=K**-0.5),
            randn(r, K, dtype=lora_dtype, scale=K**-0.5),
            randn(N, r, dtype=lora_dtype, scale=r**-0.5),
            randn(N, dtype=dtype) if bias else None,
            randn(M, N, dtype=dtype),
            p=p,
        )

    def _seed(self):
        return torch.tensor(self.seed, dtype=torch.int64, device=DEVICE) if self.p else None

    def kernels(self, gpu: Gpu, precision="ieee", needs=(True, True, True)) -> dict[str, torch.Tensor]:
        dropout = Dropout(self.p, self._seed())
        scale = torch.tensor(self.scale, dtype=torch.float32, device=DEVICE)
        y, xa = lora_linear_forward(self.x, self.weight, self.A, self.B, self.bias, scale, dropout, gpu, precision)
        *grads, _ = lora_linear_backward(
            self.dy, self.x, self.weight, self.A, self.B, xa, scale, dropout, gpu, precision, needs
        )
        return dict(zip(RESULTS, (y, *grads), strict=True))

    def exact(self) -> dict[str, torch.Tensor]:
        """In float64, unrounded in between."""
        x, weight, A, B, dy = (t.double() for t in (self.x, self.weight, self.A, self.B, self.dy))
        dropped = reference.dropout(x, self.p, self._seed())
        dxa = self.scale * dy @ B
        y = x @ weight.T + self.scale * dropped @ A.T @ B.T
        return {
            "y": y if self.bias is None else y + self.bias.double(),
            "dx": dy @ weight + reference.dropout(dxa @ A, self.p, self._seed()),
            "dA": dxa.T @ dropped,
            "dB": self.scale * dy.T @ (dropped @ A.T),
        }

    def torch(self) -> dict[str, torch.Tensor]:
        """The unfused formula by torch's autograd, everything in x's dtype."""
        dtype = self.x.dtype
        x, A, B = (t.detach().to(dtype).requires_grad_() for t in (self.x, self.A, self.B))
        dropped = reference.dropout(x, self.p, self._seed())
        y = F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(dropped, A), B)
        grads = torch.autograd.grad(y, (x, A, B), self.dy)
        return dict(zip(RESULTS, (y.detach(), *grads), strict=True))
