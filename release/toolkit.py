"""What the wheel is built with: this machine's nvcc, in front of CUDA 12.9's assembler and static runtime.

A driver runs what a toolkit of its own major version or an older one has made. With the assembler and the runtime of
CUDA 12, which PyPI has, one library serves the drivers of CUDA 12 and of CUDA 13; the front ends may be newer.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from setup import Toolchain

from . import old_linux
from .commands import output, run

ASSEMBLER, RUNTIME = "nvidia-cuda-nvcc-cu12==12.9.86", "nvidia-cuda-runtime-cu12==12.9.79"
PTX = "8.3"  # the oldest language that says all that the kernels say
# Compressed by zstd, as is the default, code would be for drivers from 12.4 on; a wheel is compressed anyway.
NVCC_FLAGS = ["--compress-mode=none"]

CICC = """#!/bin/sh
# The compiler, whose PTX then says that it is of an older language. Its result is the last argument.
"{cicc}" "$@" || exit
for made; do :; done
exec sed -i 's/^\\.version .*/.version {ptx}/' "$made"
"""


def download(requirement: str, folder: Path) -> Path:
    """A wheel of PyPI."""
    name, _, version = requirement.replace("===", "==").partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    if not list(folder.glob(pattern)):
        run(*pip, "--dest", str(folder), requirement)
    (found,) = folder.glob(pattern)
    return found


def unpacked(wheel: Path, *prefixes: str) -> Path:
    """Those files of a wheel whose paths begin so, in a folder beside it."""
    folder, unfinished = wheel.with_suffix(""), wheel.with_suffix(".part")
    if not folder.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unfinished, [name for name in archive.namelist() if name.startswith(prefixes)])
        unfinished.rename(folder)
    return folder


def nvcc_home() -> Path:
    """The folder of this machine's CUDA toolkit; nvcc on the path may be a script that calls it."""
    nvcc = shutil.which("nvcc") or os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    if not os.path.exists(nvcc):
        raise SystemExit("make wheel needs nvcc of CUDA 13, on the path or under CUDA_HOME")
    release = re.search(r"release (\d+)\.", output(nvcc, "--version"))
    if release is None or int(release[1]) < 13:
        raise SystemExit(f"make wheel needs nvcc of CUDA 13, got {nvcc} of {release[1] if release else 'no version'}")
    said = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    return Path(re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)[1]).resolve()


def assemble(home: Path, assembler: Path, folder: Path) -> Path:
    """A toolkit of links to one whose ptxas is another one; its nvcc."""
    shutil.rmtree(folder, ignore_errors=True)
    binaries, compiler = folder / "bin", folder / "nvvm" / "bin"
    for path in (binaries, compiler):
        path.mkdir(parents=True)
    for path in [*home.iterdir(), *(home / "bin").iterdir(), home / "nvvm" / "libdevice"]:
        if path.name not in ("bin", "nvvm", "nvcc", "ptxas"):
            (folder / path.relative_to(home)).symlink_to(path)
    shutil.copy2(home / "bin" / "nvcc", binaries / "nvcc")  # which looks for the others beside itself
    shutil.copy2(assembler, binaries / "ptxas")
    (compiler / "cicc").write_text(CICC.format(cicc=home / "nvvm" / "bin" / "cicc", ptx=PTX))
    for path in (binaries / "ptxas", compiler / "cicc"):
        path.chmod(0o755)
    return binaries / "nvcc"


def prepare(folder: Path) -> Toolchain:
    """Everything in a folder, downloaded once."""
    home = nvcc_home()
    folder.mkdir(parents=True, exist_ok=True)
    assembler = unpacked(download(ASSEMBLER, folder), "nvidia/cuda_nvcc/bin/ptxas")
    runtime = unpacked(download(RUNTIME, folder), "nvidia/cuda_runtime/lib/libcudart_static.a")
    # Its name tells what it is made of: objects by another one are made again.
    named = folder / f"{home.name}-{ASSEMBLER.partition('==')[2]}-{PTX}"
    return Toolchain(
        nvcc=str(assemble(home, assembler / "nvidia/cuda_nvcc/bin/ptxas", named)),
        runtime=runtime / "nvidia/cuda_runtime/lib/libcudart_static.a",
        nvcc_flags=NVCC_FLAGS,
        link_flags=old_linux.link_flags(folder / "linux"),
    )
