"""Every .cu compiles by plain nvcc for each architecture, without torch and without a GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90"])
@pytest.mark.parametrize("source", sorted(CSRC.glob("**/*.cu")), ids=lambda path: path.name)
def test_no_spills(source, arch, tmp_path):
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        f"-arch={arch}",
        "-cubin",
        "-Xptxas=-v,-warn-spills",
        "-Werror",
        "all-warnings",
    ]
    done = subprocess.run([*command, str(source), "-o", str(tmp_path / "out.cubin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usage = [line for line in done.stderr.splitlines() if "stack frame" in line]
    assert usage
    assert all("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line for line in usage)


@pytest.mark.parametrize("source", sorted(CSRC.glob("**/*.cu")), ids=lambda path: path.name)
def test_kernels_know_no_torch(source):
    assert not any(word in source.read_text() for word in ("torch/", "ATen/", "c10/"))
