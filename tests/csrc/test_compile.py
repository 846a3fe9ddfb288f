"""Every .cu compiles by plain nvcc, with no torch and no GPU: nothing spilled or serialised, tensor cores used."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
HOPPER = "-gencode=arch=compute_90a,code=sm_90a"
SOURCES = sorted(CSRC.glob("*.cu"))
HOPPER_SOURCES = sorted((CSRC / "sm90").glob("*.cu"))
KERNELS = [path for path in HOPPER_SOURCES if path.stem.startswith("lora_linear")]

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def compile_to(target, source, out) -> str:
    """What nvcc and ptxas say of a source, compiled to a cubin."""
    strict = ["-Xptxas=-v", "-Werror", "all-warnings"]
    command = ["nvcc", "-std=c++17", "-O3", target, "-cubin", *strict, str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def assert_no_spills(said: str) -> int:
    """How many kernels there were."""
    frames = [int(size) for size in re.findall(r"(\d+) bytes stack frame, \d+ bytes spill stores", said)]
    assert max(frames) == 0
    return len(frames)


def disassembler() -> str | None:
    """cuobjdump: the toolkit's, or the one in Triton's package."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton")
        found = shutil.which("cuobjdump", path=str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    return found


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_spills(source, arch, tmp_path):
    assert assert_no_spills(compile_to(f"-arch={arch}", source, tmp_path / "out.cubin")) > 0


# For each pass: two dtypes times seven tiles, or times three where it is gated.
@needs_nvcc
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_hopper_kernels(source, tmp_path):
    said = compile_to(HOPPER, source, tmp_path / "out.cubin")
    count = 6 if "gated" in source.stem else 14
    assert assert_no_spills(said) == count
    # C7510, C7512 and their like: the compiler waits after every product. C7519: it had to add a fence of its own.
    assert not re.findall(r"\(C75\d\d\)", said)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    assert set(registers) == {65536 // 384 // 8 * 8}
    command = disassembler()
    if command is None:
        pytest.skip("needs cuobjdump")
    sass = subprocess.run([command, "-sass", str(tmp_path / "out.cubin")], capture_output=True, text=True, check=True)
    kernels = sass.stdout.split("Function : ")[1:]
    assert len(kernels) == count
    for kernel in kernels:
        assert "HGMMA" in kernel
        assert "UTMALDG" in kernel
        assert not re.search(r"\b(LDL|STL)\b", kernel)
        # Where the compiler takes a loop of products for divergent, it makes their descriptors in vector registers, and
        # moves each before its product: 2 to 4% slower. From one product to the next, without a branch:
        between = re.findall(r"\bHGMMA\b((?:(?!\bBRA\b).)*?)(?=\bHGMMA\b)", kernel, re.DOTALL)
        assert between
        assert not any("R2UR" in instructions for instructions in between)
        # A step waits for the products of the one before, not for its own.
        assert "gsb0, 0x1" in kernel


@needs_nvcc
@pytest.mark.parametrize("source", HOPPER_SOURCES, ids=lambda path: path.name)
def test_hopper_sources_compile_empty_for_other_cards(source, tmp_path):
    compile_to("-arch=sm_80", source, tmp_path / "out.cubin")


@pytest.mark.parametrize("source", [*SOURCES, *HOPPER_SOURCES, *CSRC.glob("**/*.*h")], ids=lambda path: path.name)
def test_kernels_know_no_torch(source):
    knows = any(word in source.read_text() for word in ("torch/", "ATen/", "c10/"))
    assert knows == (source.name == "tensors.h")


@pytest.mark.parametrize("source", [*CSRC.glob("**/*.*")], ids=lambda path: path.name)
def test_assembly_is_in_one_room(source):
    assert ("asm" in re.findall(r"\w+", source.read_text())) == (source.parent.name == "ptx")
