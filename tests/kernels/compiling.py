"""Kernels compiled to cubins without a GPU or a driver, and what the cubin needs."""

import os
import re
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fused_lora.kernels.launch import Plan

_CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


class _TargetOnlyDriver:
    """As much of a driver as JITFunction.warmup asks for."""

    def __init__(self, capability: int):
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")


@dataclass(frozen=True)
class Resources:
    """Of one cubin: registers a thread, bytes of stack frame, bytes of shared memory, tensor-core instructions."""

    registers: int
    stack: int
    shared_memory: int
    tensor_core_instructions: int
    bulk_copies: int


@contextmanager
def compiling_for(capability: int):
    driver.set_active(_TargetOnlyDriver(capability))
    try:
        yield
    finally:
        # reset_active looks for a GPU at once and raises without one.
        driver.reset_active() if torch.cuda.is_available() else driver.set_active(None)


def compile_launch(plan: Plan, args: tuple) -> Resources:
    """The resources of a recorded launch for the target of compiling_for."""
    plan.kernel.device_caches.clear()
    compiled = plan.kernel.warmup(*args, grid=plan.grid, **plan.meta)
    plan.kernel.device_caches.clear()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
        sass = subprocess.run([_CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    products = len(re.findall(r"\bHG?MMA\b", sass))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups()
    return Resources(int(registers), int(stack), compiled.metadata.shared, products, sass.count("UTMALDG"))
