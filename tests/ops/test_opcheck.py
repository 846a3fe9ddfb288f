"""torch's own examination of every op of the namespace. test_lora_parts.py has more of the two that compute layers."""

import pytest
import torch

from fused_lora import reference, segments
from fused_lora.ops import segmented as of_segments
from tests.ops.problem import DEVICES, SCALE, make_inputs
from tests.ops.test_lora_parts import backward_arguments, flatten, make_parts
from tests.ops.test_merge_and_reinit import SHAPES, make_layers, zeros_beside

ops = torch.ops.fused_lora


def parts_of(device, dtype=torch.float32, K=10):
    return make_parts(12, K, [(7, 3), (24, 5)], device, dtype, None)


def forward(device):
    x, parts = parts_of(device)
    yield x, flatten(parts), 0.0, [], "none"
    yield segmented(device, False)
    yield segmented(device, True)


def segmented(device, drops):
    """Rows with adapters of their own: two of 12 rows, one of them with both."""
    x, parts = make_parts(12, 10, [(7, 64)], device, torch.float32, None)
    plan = segments.make_plan([[segments.Place(0, 16)], [], [segments.Place(0, 16), segments.Place(32, 32)]])
    ends = torch.tensor([4, 6, 11], dtype=torch.int32, device=device)
    tables = segments.tables(plan, segments.constants(plan, x.device), ends, 12)
    thresholds = torch.full((4,), reference.mask_threshold(0.25), dtype=torch.int32, device=device) if drops else None
    seed = torch.tensor(3, device=device) if drops else None
    part = parts[0]._replace(scale=torch.rand(4, device=device), seed=seed)
    tensors = of_segments.flatten([of_segments.Segments(tables, plan.window, thresholds)])
    return x, flatten([part]), 0.0, [], "none", tensors, plan.window


def backward(device):
    x, parts = parts_of(device)
    for each in (parts, [parts[0]._replace(gain=torch.rand(7, device=device)), parts[1]]):
        *ys, xa, other = ops.lora_parts_forward(x, flatten(each), 0.0, [], "none")
        yield backward_arguments(x, each, [xa, other], 0.0, (True, True, True, True), ys)
    for drops in (False, True):
        x, part, *rest = segmented(device, drops)
        y, xa = ops.lora_parts_forward(x, part, *rest)
        for needs in ([True, True, True], [True, False, False]):
            yield [torch.ones_like(y)], [x], part, [xa], [None], 0.0, True, needs, [], [], False, [], *rest[-2:]


def again(device):
    """Its arguments are what a backward pass saved, of which some require gradients."""
    x, (part, _) = parts_of(device)
    part = part._replace(gain=torch.rand(7, device=device))
    part = part._replace(**{name: getattr(part, name).requires_grad_() for name in ("A", "B", "bias", "gain")})
    yield [x.new_ones(12, 7)], x.requires_grad_(), flatten([part]), 0.0, [], True, [True] * 4


def row_norms(device):
    yield from merge(device)


def merge(device, dtype=torch.float32):
    inputs = make_inputs(1, 10, 7, 3, device, dtype)
    yield *(inputs[name].detach() for name in ("weight", "A", "B")), torch.tensor(SCALE, device=device)


def restart(device):
    scales = [torch.tensor(SCALE, device=device)] * len(SHAPES)
    for has_lows, stochastic in ((False, False), (False, True), (True, False)):
        layers = make_layers(device)
        lows = zeros_beside(layers) if has_lows else []
        yield layers["weights"], layers["As"], layers["Bs"], scales, layers["seeds"], lows, stochastic


def csrc_forward(device):
    x, parts = parts_of(device, torch.bfloat16, 72)
    yield x, flatten(parts), 0.0, [], "none"


def csrc_backward(device):
    x, parts = parts_of(device, torch.bfloat16, 72)
    for each in (parts, [parts[0]._replace(gain=torch.rand(7, device=device)), parts[1]]):
        *ys, xa, other = ops.cuda_lora_parts_forward(x, flatten(each), 0.0, [], "none")
        yield backward_arguments(x, each, [xa, other], 0.0, (True, True, True, True), ys)


ARGUMENTS = {
    "lora_parts_forward": forward,
    "lora_parts_backward": backward,
    "lora_again": again,
    "lora_row_norms": row_norms,
    "merge_": merge,
    "merge_and_reinit_": restart,
}
# csrc's, which are called within these alone: they have no fakes, and what they say that they change is left to check.
CSRC_ARGUMENTS = {
    "cuda_lora_parts_forward": csrc_forward,
    "cuda_lora_parts_backward": csrc_backward,
    "cuda_merge_": merge,
}


def test_every_op_is_examined():
    names = {name.removeprefix("fused_lora::").split(".")[0] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("fused_lora::")}  # fmt: skip
    assert ARGUMENTS.keys() <= names <= ARGUMENTS.keys() | CSRC_ARGUMENTS.keys()


# Of torch 2.14's own checks.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name, device):
    for arguments in ARGUMENTS[name](device):
        utils = ALL_BUT_VALUES if name == "lora_parts_forward" and has_boxes(arguments) else ALL_UTILS
        torch.library.opcheck(getattr(ops, name).default, arguments, test_utils=utils)


# What no row has in the boxes of xa is nobody's, and not the same in two calls.
ALL_UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
ALL_BUT_VALUES = ALL_UTILS[:-1]


def has_boxes(arguments):
    return arguments[0].is_cuda and len(arguments) > 5


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("name", CSRC_ARGUMENTS)
def test_schemas_of_csrc(name):
    for arguments in CSRC_ARGUMENTS[name]("cuda"):
        torch.library.opcheck(getattr(ops, name).default, arguments, test_utils="test_schema")
