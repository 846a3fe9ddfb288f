"""Passes of several launches, looked at once and then replayed.

What a pass allocates and launches is the same for all inputs of one layout. By way of the launchers, each of which
looks up its plan, describes matrices to the copy engine and hands Triton fifty arguments, a forward pass takes the host
ten times what a product of torch takes. Replayed it is a call of a C function a launch: its arguments are kept under
the pointers that they were made of, and torch's allocator gives the same ones out again and again.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from ..layout import layout_of
from ..recent import Recent
from . import launch
from .launch import Plan, record_launches

MOST_PASSES = 4096
MOST_CALLS = 8192  # passes' arguments by pointers; 1 KB a launch
ALIGNMENT = 256  # of a buffer, as torch's allocator has it

aten = torch.ops.aten
_NO_WORK = (aten.empty.memory_format, aten.new_empty.default, aten._unsafe_view.default)


class Role(NamedTuple):
    """An argument that is an operand: its number, and as whose descriptor it is passed."""

    operand: int
    like: TensorDescriptor | None


class Pointer(int):
    """What a descriptor asks of its tensor."""

    def data_ptr(self) -> int:
        return int(self)


class _OtherWork(TorchDispatchMode):
    """Whether something is computed by torch meanwhile."""

    found = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found = self.found or function not in _NO_WORK
        return function(*args, **(kwargs or {}))


class _Places:
    """The numbers of a pass's operands: inputs are known as objects, what it allocates by the memory."""

    def __init__(self, inputs: Sequence[Tensor | None]):
        given = [tensor for tensor in inputs if tensor is not None]
        self.inputs = {id(tensor): place for place, tensor in enumerate(inputs) if tensor is not None}
        self.taken = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.buffers: dict[int, Tensor] = {}
        self.first = len(inputs)

    def of(self, tensor: Tensor) -> int:
        """LookupError for a part of an input, or of a buffer. A buffer has the shape in which it was seen last."""
        if id(tensor) in self.inputs:
            return self.inputs[id(tensor)]
        memory = tensor.untyped_storage().data_ptr()
        if memory in self.taken or memory != tensor.data_ptr() or not tensor.is_contiguous():
            raise LookupError(tensor.shape)
        self.buffers[memory] = tensor
        return self.first + list(self.buffers).index(memory)

    def role(self, argument):
        """An argument of a launch, with operands by their numbers."""
        if isinstance(argument, TensorDescriptor):
            return Role(self.of(argument.base), launch.without_base(argument))
        return Role(self.of(argument), None) if isinstance(argument, Tensor) else argument


class Replay:
    """A pass as data: operands are its inputs, then what it allocates. Of that only results are tensors of their own:
    an allocation takes the host as long as five lookups."""

    def __init__(self, device: torch.device):
        self.device = device
        self.results: list[tuple[int, torch.Size, torch.dtype]] = []  # operands that are returned
        self.offsets: list[tuple[int, int]] = []  # of others in one buffer, in bytes
        self.scratch_bytes = 0
        self.launches: list[tuple[Plan, tuple]] = []
        self.outputs: list[int | None] = []

    @classmethod
    def of(cls, function: Callable, inputs: Sequence[Tensor | None], constants: tuple) -> "Replay | None":
        """None for a pass that does more than to allocate and to launch."""
        with record_launches() as records, _OtherWork() as other:
            results = function(*inputs, *constants)
        if other.found or any(plan.compiled is None for plan, _ in records):
            return None
        replay, places = cls(inputs[0].device), _Places(inputs)
        try:
            replay.launches = [(plan, tuple(map(places.role, args))) for plan, args in records]
            replay.outputs = [None if result is None else places.of(result) for result in results]
        except LookupError:
            return None
        replay._allocate(places)
        return replay

    def _allocate(self, places: _Places) -> None:
        for operand, tensor in enumerate(places.buffers.values(), places.first):
            if operand in self.outputs:
                self.results.append((operand, tensor.shape, tensor.dtype))
            else:
                self.offsets.append((operand, self.scratch_bytes))
                self.scratch_bytes += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT

    def run(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The pass's results for inputs of the same layout."""
        new_empty = inputs[0].new_empty
        operands = list(inputs) + [None] * (len(self.results) + len(self.offsets))
        for operand, shape, dtype in self.results:
            operands[operand] = new_empty(shape, dtype=dtype)
        pointers = [None if operand is None else operand.data_ptr() for operand in operands]
        if self.scratch_bytes:
            # Given back when all is launched: whoever gets it next comes later in the stream.
            scratch = new_empty(self.scratch_bytes, dtype=torch.uint8)
            start = scratch.data_ptr()
            for operand, offset in self.offsets:
                pointers[operand] = start + offset
        pointers = tuple(pointers)
        stream = driver.active.get_current_stream(self.device.index)
        for call, arguments in _calls.get((self, stream, pointers), lambda: self._calls_of(stream, pointers)):
            call(*arguments)
        return tuple([None if place is None else operands[place] for place in self.outputs])

    def _calls_of(self, stream: int, pointers: tuple[int | None, ...]) -> list[tuple[Callable, tuple]]:
        def materialised(argument):
            if not isinstance(argument, Role):
                return argument
            pointer = pointers[argument.operand]
            return pointer if argument.like is None else launch.with_base(argument.like, Pointer(pointer))

        return [plan.call(stream, tuple(map(materialised, arguments))) for plan, arguments in self.launches]


class Pass:
    """function(*inputs, *constants) for inputs of one layout.

    The first call makes plans and compiles, the second is recorded, and later ones are replayed. Where somebody looks
    on (who records launches, or a profiler), all is done the long way.
    """

    __slots__ = ("_called", "_constants", "_function", "_never", "_replay")

    def __init__(self, function: Callable, constants: tuple):
        self._function, self._constants = function, constants
        self._called, self._never, self._replay = False, False, None

    def __call__(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        if launch.observed():
            return self._function(*inputs, *self._constants)
        if self._replay is not None:
            return self._replay.run(inputs)
        if self._called and not self._never and _are_different(inputs):
            self._replay = Replay.of(self._function, inputs, self._constants)
            if self._replay is not None:
                return self._replay.run(inputs)
            self._never = True
        self._called = True
        return self._function(*inputs, *self._constants)


def _are_different(inputs: Sequence[Tensor | None]) -> bool:
    """Whether each has a place of its own in a recording."""
    tensors = [id(tensor) for tensor in inputs if tensor is not None]
    return len(set(tensors)) == len(tensors)


_passes = Recent(MOST_PASSES)
_calls = Recent(MOST_CALLS)


def replayed(
    function: Callable, inputs: Sequence[Tensor | None], constants: Callable[[], tuple], kind: tuple | None = None
) -> tuple[Tensor | None, ...]:
    """function(*inputs, *constants()); replayed where it only allocates and launches.

    constants have no memory. kind stands for them and for the inputs' layouts, where such a key is at hand.
    """
    device = inputs[0].device
    if device.type != "cuda":  # on a CPU Triton's interpreter runs, on `meta` nothing
        return function(*inputs, *constants())
    if kind is None:
        kind = (device, constants(), *map(layout_of, inputs))
    return _passes.get((function, kind), lambda: Pass(function, constants()))(inputs)
