"""What autograd does with parts: the Function around the ops, second derivatives, and who must see plain torch."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from . import flops, recomputed
from .library import LIBRARY, ops
from .parts import Part, columns, flatten, trains, unflatten

NOTHING = Part(*(None,) * len(Part._fields))


def apply(x: Tensor, parts: Sequence[Part], p: float) -> tuple[Tensor, ...]:
    """The ys of parts that read x, checked and complete."""
    if in_plain_torch(parts):
        return linears(x, parts, p)
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
        flops.show()
    if trains(x, parts):
        if len(parts) == 1 and parts[0].gain is None and recomputed.is_worth(x, parts[0].weight):
            (stand_in,) = _SavedFirst.apply(x, p, *flatten(parts))
            return (recomputed.result(stand_in, lambda: ops.lora_parts_forward(x, flatten(parts), p, [], "none")[0]),)
        return LoRAPartsFunction.apply(x, p, *distinct(x, flatten(parts)))
    return tuple(ops.lora_parts_forward(x, flatten(parts), p, [], "none")[: len(parts)])


def distinct(x: Tensor, tensors: list[Tensor | None]) -> list[Tensor | None]:
    """As arguments of a Function, of which torch.compile wants none twice: what comes again becomes a view."""
    if not torch.compiler.is_compiling():
        return tensors
    seen, found = [x], []
    for tensor in tensors:
        again = tensor is not None and any(tensor is each for each in seen)
        found.append(tensor.view_as(tensor) if again else tensor)
        seen.append(tensor)
    return found


class LoRAPartsFunction(torch.autograd.Function):
    """An autograd.Function outside and a plain op inside: the cheapest wrapper that torch.compile sees through."""

    @staticmethod
    def forward(ctx, x, p, *flat):
        parts = unflatten(flat)
        results = ops.lora_parts_forward(x, flat, p, [], "none")
        ys, xas = results[: len(parts)], results[len(parts) :]
        ctx.p = p
        ctx.save_for_backward(x, *xas, *read_for_gains(ys, parts), *flatten(map(saved, parts)))
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *all_dys):
        count = len(all_dys)
        x, *rest = ctx.saved_tensors
        need_dx, _, *needs = ctx.needs_input_grad
        xas, ys, parts = rest[:count], rest[count : 2 * count], unflatten(rest[2 * count :])
        each = zip(all_dys, xas, ys, parts, unflatten(needs), strict=True)
        # A part that nobody used has no share in dx, and its factors get no gradients, as if it had stood alone.
        used = [of_part for of_part in each if of_part[0] is not None]
        if not used or not any(ctx.needs_input_grad):
            return (None,) * len(ctx.needs_input_grad)
        dys, xas, ys, parts, needs = zip(*used, strict=True)
        dx, grads = _gradients(dys, x, xas, ys, parts, ctx.p, need_dx, needs)
        found = iter(grads)
        return dx, None, *flatten([NOTHING if dy is None else next(found) for dy in all_dys])


class _SavedFirst(LoRAPartsFunction):
    """The same of one part in a checkpoint's second pass, which may stop before the result."""

    @staticmethod
    def forward(ctx, x, p, *flat):
        (part,) = unflatten(flat)
        stand_in, xa = recomputed.stand_in_and_low(x, part, p)
        ctx.p = p
        ctx.save_for_backward(x, xa, None, *flatten([saved(part)]))
        ctx.set_materialize_grads(False)
        return (stand_in,)


def _gradients(dys, x, xas, ys, parts, p, need_dx, needs) -> tuple[Tensor | None, list[Part]]:
    """dx, and the gradients of parts."""
    if needs_formula(dys):
        formula = lambda x, parts: linears(x, parts, p)  # noqa: E731
        dx, _, *grads = by_formula(formula, dys, x, parts, need_dx, flatten(needs))
        return dx, unflatten(grads)
    wanted, count = wanted_of(needs), len(parts)
    ys = wanted_ys(ys, needs)
    dx, *grads = ops.lora_parts_backward(
        dys, [x] * count, flatten(parts), list(xas), [None] * count, p, need_dx, wanted, [], [], False, ys
    )
    return dx if need_dx else None, of_inputs(grads, wanted, ys)


def saved(part: Part) -> Part:
    """As a backward pass reads it: of the bias the dtype of its gradient; all of it where there is a gain."""
    if part.gain is not None:
        return part
    trained = part.bias is not None and part.bias.requires_grad
    return part._replace(bias=part.bias.new_empty(0) if trained else None)


def read_for_gains(ys: Sequence[Tensor | None], parts: Sequence[Part]) -> list[Tensor | None]:
    """The results of which a backward pass makes gains' gradients."""
    trained = (part.gain is not None and part.gain.requires_grad for part in parts)
    return [y if read else None for y, read in zip(ys, trained, strict=True)]


def wanted_of(parts: Sequence[Part]) -> list[bool]:
    """Of parts' needs those of As, then of Bs, then of biases."""
    return [part.A for part in parts] + [part.B for part in parts] + [part.bias for part in parts]


def wanted_ys(ys: Sequence[Tensor | None], needs: Sequence[Part]) -> list[Tensor | None]:
    """As lora_parts_backward takes them."""
    wanted = [y if need.gain else None for y, need in zip(ys, needs, strict=True)]
    return wanted if any(y is not None for y in wanted) else []


def of_inputs(grads: Sequence[Tensor], wanted: Sequence[bool], ys: Sequence[Tensor | None]) -> list[Part]:
    """dAs, dBs, dbiases and with ys dgains as gradients of parts."""
    wanted = [*wanted, *(y is not None for y in ys)]
    grads = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    count = len(wanted) // (4 if ys else 3)
    dAs, dBs, dbiases, dgains = [*columns(grads, count), [None] * count][:4]
    each = zip(dAs, dBs, dbiases, dgains, strict=True)
    return [NOTHING._replace(A=dA, B=dB, bias=dbias, gain=dgain) for dA, dB, dbias, dgain in each]


def _with_bias(part: Part) -> Part:
    """Of a linear's bias no value was saved, and any will do."""
    if part.bias is None or part.bias.numel() > 0:
        return part
    return part._replace(bias=part.bias.new_zeros(part.weight.shape[0]).requires_grad_())


def needs_formula(dys: Sequence[Tensor]) -> bool:
    """Whether the backward pass that runs is to be differentiated itself, or is many at once: of torch.func.vmap, or
    is_grads_batched, which torch.autograd.functional's vectorize sets. Compiled ones are neither."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or any(map(_is_many, dys))


def _is_many(dy: Tensor) -> bool:
    return torch._C._functorch.is_batchedtensor(dy) or torch._C._functorch.is_legacy_batchedtensor(dy)


def by_formula(formula: Callable, dys: Sequence[Tensor], x: Tensor, parts: list[Part], need_dx: bool, needs) -> tuple:
    """The backward pass of ys = formula(x, parts) in plain torch, whose results can be differentiated.

    In x's dtype, whatever torch.autocast says where the backward pass runs: of the forward it has had its say.
    """
    tensors = (x, *flatten(map(_with_bias, parts)))
    dx, *grads = partials(lambda x, *flat: formula(x, unflatten(flat)), dys, tensors, (need_dx, *needs))
    return dx, None, *grads


def partials(formula: Callable, dys: Sequence[Tensor], inputs: Sequence, needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of formula(*inputs) that are needed, so that they can be differentiated where a graph is kept."""
    again = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(dys[0].device.type, enabled=False):
        # Twins of the inputs: what is wanted are partial derivatives, also where one input was made from another.
        twins = [tensor.view_as(tensor) if need else tensor for tensor, need in zip(inputs, needs, strict=True)]
        wanted = [twin for twin, need in zip(twins, needs, strict=True) if need]
        found = iter(torch.autograd.grad(formula(*twins), wanted, dys, create_graph=again))
    return [next(found) if need else None for need in needs]


def _again(dys, x, tensors, p, act, need_dx, needs):
    """by_formula for csrc's autograd: dx, dAs, dBs, dbiases and dgains, empty where not wanted; with act, of an MLP."""
    parts = unflatten(tensors)
    each = zip(*columns(needs, len(parts)), strict=True)
    all_needs = flatten([Part(False, *need, False, False, gain) for *need, gain in each])
    formula = (lambda x, parts: [mlp(x, parts, p, act)]) if act else (lambda x, parts: linears(x, parts, p))
    dx, _, *grads = by_formula(formula, dys, x, parts, need_dx, all_needs)
    kinds = zip(*((part.A, part.B, part.bias, part.gain) for part in unflatten(grads)), strict=True)
    in_order = (dx, *(grad for kind in kinds for grad in kind))
    return [x.new_empty(0) if grad is None else grad for grad in in_order]


LIBRARY.define(
    "lora_again(Tensor[] dys, Tensor x, Tensor?[] parts, float p, float[] act, bool need_dx, bool[] needs) -> Tensor[]"
)
for key in ("CompositeImplicitAutograd", "FuncTorchBatched", "Batched"):
    LIBRARY.impl("lora_again", _again, key)


def in_plain_torch(parts: Sequence[Part]) -> bool:
    """Whether a pass is by the formula: somebody looks on, or a weight was made from what requires gradients, as the
    views of one flat parameter that FSDP's first version lends. These have their gradients too then."""
    if watched():
        return True
    made = torch.is_grad_enabled() and any(part.weight.requires_grad for part in parts)
    if made and not torch.compiler.is_compiling():
        warnings.warn("weight was made from a tensor that requires gradients: computed in plain torch", stacklevel=4)
    return made


def watched() -> bool:
    """Whether somebody looks on who must see plain torch: a transformation of torch.func, a forward-mode derivative,
    or a tracer that writes programs for elsewhere. All of it holds in compiled code too."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.compiler._is_exporting_flag  # torch 2.11 compiles is_exporting() to True wherever it is
        or torch.jit.is_tracing()
    )


def linears(x: Tensor, parts: Sequence[Part], p: float) -> tuple[Tensor, ...]:
    """The ys of parts in plain torch, in x's dtype."""
    return tuple(_linear(x, *part, p) for part in parts)


def _linear(x, weight, A, B, bias, scale, seed, gain, p) -> Tensor:
    bias = bias if bias is None else bias.to(x.dtype)
    return reference.lora_linear_ref(x, weight, A.to(x.dtype), B.to(x.dtype), bias, scale, p, seed, gain)


def mlp(x: Tensor, parts: Sequence[Part], p: float, act: Sequence[float]) -> Tensor:
    """down(act(gate(x)) up(x)) in plain torch, in x's dtype."""
    gate, up = linears(x, parts[:2], p)
    return linears(reference.gated(gate, up, *act), parts[2:], p)[0]
