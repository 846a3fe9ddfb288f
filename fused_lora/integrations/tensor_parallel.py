"""LoRALinear under tensor parallelism: ColwiseLoRA and RowwiseLoRA for torch.distributed.tensor.parallel."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.nn import functional as F

from .. import ops
from ..modules import LoRALinear
from ..modules.mixins import Mixin, mix
from ..ops.parts import drawn_seed

COLWISE = {
    "weight": Shard(0), "bias": Shard(0), "lora_A": Replicate(), "lora_B": Shard(0), "lora_magnitude_vector": Shard(0),
}  # fmt: skip
ROWWISE = {
    "weight": Shard(1), "bias": Replicate(), "lora_A": Shard(1), "lora_B": Replicate(),
    "lora_magnitude_vector": Replicate(),
}  # fmt: skip


class ColwiseLoRA(ColwiseParallel):
    """Cuts a LoRALinear by its outputs, as ColwiseParallel cuts nn.Linear (which it goes on doing).

        weight (N, K), lora_B (N, r), bias and lora_magnitude_vector (N,) in Shard(0), lora_A (r, K) on every rank

    input_layouts, output_layouts and use_local_output are ColwiseParallel's: by default x (..., K) comes whole and
    y (..., N) leaves as this rank's columns. All ranks drop the same entries of x. Parameters are DTensors; each rank's
    kernels compute its own rows, and the gradients of lora_A and x are summed over the ranks.

        parallelize_module(model, mesh, {"*.up_proj": ColwiseLoRA(), "*.down_proj": RowwiseLoRA()})
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, LoRALinear):
            return super()._apply(module, device_mesh)
        return _cut(module, self, device_mesh, COLWISE)


class RowwiseLoRA(RowwiseParallel):
    """Cuts a LoRALinear by its inputs, as RowwiseParallel cuts nn.Linear (which it goes on doing).

        weight (N, K), lora_A (r, K) in Shard(1), lora_B (N, r), bias and lora_magnitude_vector (N,) on every rank

    input_layouts, output_layouts and use_local_output are RowwiseParallel's: by default x (..., K) comes as this rank's
    columns and y (..., N) leaves whole, the sum of what the ranks computed; the bias is in it once. Each rank drops
    entries of its own columns. DoRA's norms are those of whole rows, from a sum over the ranks in each call.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, LoRALinear):
            return super()._apply(module, device_mesh)
        return _cut(module, self, device_mesh, ROWWISE)


def _cut(layer: LoRALinear, style: ParallelStyle, mesh: DeviceMesh, placements: dict[str, Placement]) -> nn.Module:
    if layer.base is not None:
        raise NotImplementedError(f"weight must be in no format to be cut by tensor parallelism, got {layer.base.name}")
    for name, parameter in list(layer.named_parameters()):
        shards = distribute_tensor(parameter.detach(), mesh, [placements[name]], src_data_rank=style.src_data_rank)
        setattr(layer, name, nn.Parameter(shards, requires_grad=parameter.requires_grad))
    layer._style = style
    mix(layer, ShardedLinear)
    return layer


class ShardedLinear(Mixin):
    """A LoRALinear of which each rank holds and computes a part."""

    _adds = ("_style",)
    _style: ColwiseLoRA | RowwiseLoRA

    def forward(self, input: Tensor) -> Tensor:
        style, mesh = self._style, self.weight.device_mesh
        reads, gives = (Shard(-1), Partial()) if self._is_rowwise else (Replicate(), Shard(-1))
        x = input if isinstance(input, DTensor) else _joined(input, mesh, *style.input_layouts, self.in_features)
        y = self._compute(_local(x.redistribute(placements=[reads])), mesh)
        y = _joined(y, mesh, gives, self.out_features).redistribute(placements=style.output_layouts)
        return y.to_local() if style.use_local_output else y

    @property
    def _is_rowwise(self) -> bool:
        return isinstance(self._style, RowwiseLoRA)

    def _compute(self, x: Tensor, mesh: DeviceMesh) -> Tensor:
        """This rank's columns of y, or its share of the sum that y is."""
        weight, A, B, bias, magnitudes = (
            None if parameter is None else _local(parameter.redistribute(placements=parameter.placements))
            for parameter in (self.weight, self.lora_A, self.lora_B, self.bias, self.lora_magnitude_vector)
        )
        if bias is not None and self._is_rowwise and mesh.get_local_rank() > 0:
            bias = bias * 0  # it is in the sum already, and all ranks take part in its gradient
        if self.merged:
            return F.linear(x, weight, bias)
        scale, p = self._scale_beside(weight), self.dropping
        gain = None if magnitudes is None else magnitudes / self._norms(weight, A, B, scale, mesh)
        return ops.lora_linear(x, weight, A, B, bias, scale, p, self._seed(x, p, mesh), gain)

    def _norms(self, weight: Tensor, A: Tensor, B: Tensor, scale: Tensor, mesh: DeviceMesh) -> Tensor:
        """Of whole rows of W + scale B A."""
        norms = ops.row_norms(weight, A, B, scale)
        if not self._is_rowwise:
            return norms
        squares = norms.double().square()  # the least norm's is too small for float32
        dist.all_reduce(squares, group=mesh.get_group())
        return squares.sqrt().to(norms.dtype)

    def _seed(self, x: Tensor, p: float, mesh: DeviceMesh) -> Tensor | None:
        """Where all ranks have the same x that of the first, since their generators may differ; else each its own,
        since their generators may not."""
        seed = drawn_seed(x, p, None)
        if seed is None:
            return None
        if self._is_rowwise:
            return seed + mesh.get_local_rank()
        dist.broadcast(seed, group=mesh.get_group(), group_src=0)
        return seed

    def offered(self, x: Tensor) -> str:
        """Nobody may compute it but by calling it: its x and y are moved between ranks."""
        return "it is in shards, which its own forward puts together"


def _local(tensor: DTensor) -> Tensor:
    """This rank's part. What every rank has gets a share of its gradient from each, and redistribute(), to the
    placements that it has, sums them."""
    placements = tensor.placements
    return tensor.to_local(grad_placements=[Partial() if each.is_replicate() else each for each in placements])


def _joined(part: Tensor, mesh: DeviceMesh, placement: Placement, features: int) -> DTensor:
    """The tensor that the ranks' parts are. Columns may be cut unevenly, where torch would guess their number."""
    if not placement.is_shard() or placement.dim not in (-1, part.dim() - 1):
        return DTensor.from_local(part, mesh, [placement], run_check=False)
    whole = torch.empty(*part.shape[:-1], features, device="meta")
    return DTensor.from_local(part, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride())
