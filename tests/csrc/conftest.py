"""The list of work of csrc's kernels, made on the CPU."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.csrc.passes import Sizes


@pytest.fixture(scope="session")
def list_work(tmp_path_factory):
    """Runs list_work.cu on passes: (sizes, items) of each."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    program = tmp_path_factory.mktemp("list_work") / "list_work"
    source = Path(__file__).parent / "list_work.cu"
    subprocess.run(["nvcc", "-std=c++17", "-O1", "-o", str(program), str(source)], check=True)

    def run(passes):
        lines = "\n".join(map(str, passes))
        done = subprocess.run([str(program)], input=lines, capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            sizes, items = line.split(";")
            numbers = map(int, items.split())
            yield Sizes.of([int(number) for number in sizes.split()]), list(zip(*[numbers] * 5, strict=True))

    return run
