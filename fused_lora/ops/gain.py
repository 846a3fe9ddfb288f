"""The backward pass of gains: y = gain sums + bias, by columns. With the gradient of the sums, parts are as without."""

from collections.abc import Sequence

from torch import Tensor

from .. import backends, reference
from .alone import in_triton, kernel_bias, rows_of
from .library import define, launching, ops
from .parts import Part


def _backward(dy, y, bias, gain, need_dbias):
    if in_triton(dy):
        from ..kernels.gain_backward import gain_backward

        with launching("gain_backward", dy):
            gpu = backends.gpu(dy.device)
            dsums, dgain, dbias = gain_backward(rows_of(dy), rows_of(y), kernel_bias(bias), gain, gpu, need_dbias)
    else:
        dsums, dgain, dbias = reference.gain_backward_ref(rows_of(dy), rows_of(y), bias, gain)
    return [dsums, dgain, dbias.to(bias.dtype) if need_dbias else dgain.new_empty(0)]


def _backward_fake(dy, y, bias, gain, need_dbias):
    rows = rows_of(dy)
    return [rows.new_empty(rows.shape), gain.new_empty(gain.shape), gain.new_empty(gain.shape if need_dbias else 0)]


define(
    "lora_gain_backward(Tensor dy, Tensor y, Tensor? bias, Tensor gain, bool need_dbias) -> Tensor[]",
    _backward,
    _backward_fake,
)


def gradients_of_sums(
    dys: Sequence[Tensor], ys: Sequence[Tensor | None], parts: Sequence[Part], needs: Sequence[Part]
) -> tuple[list[Tensor], list[Part], list[Part], list[tuple[Tensor, Tensor | None] | None]]:
    """dys, parts and their needs as if there were no gains; and where there was one, (dgain, dbias or None).

    ys are the results, of which those of parts with a gain are read.
    """
    found = []
    for dy, y, part, need in zip(dys, ys, parts, needs, strict=True):
        if part.gain is None:
            found.append((dy, part, need, None))
            continue
        dsums, dgain, dbias = ops.lora_gain_backward(dy, y, part.bias, part.gain, bool(need.bias))
        dsums = dsums.view(dy.shape)
        grads = dgain, dbias if need.bias else None
        found.append((dsums, part._replace(gain=None, bias=None), need._replace(bias=False), grads))
    return tuple(map(list, zip(*found, strict=True)))
