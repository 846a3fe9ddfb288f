"""make wheel: one wheel for Linux on x86-64 with the CUDA kernels in it, for every Python from 3.10, every torch from
2.10, and the drivers of CUDA 12 and 13.

Two builds of one commit have the same bytes.
"""

import argparse
import os
import time
from pathlib import Path

from setuptools import setup

from setup import STABLE, Toolchain, arguments, build_library, build_module, module_name

from . import toolkit
from .commands import output, run

# Those that get autograd in C++. The oldest one's headers also make the module for all others.
TORCHES = ("2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1")
PLATFORM = "manylinux_2_28_x86_64"
FOLDER = Path("build/release")  # what is downloaded and compiled, kept between builds
LIBRARIES = ("c10", "torch_cpu", "torch_python")
NEEDED = ("torch/include/", "torch/version.py", *(f"torch/lib/lib{name}.so" for name in LIBRARIES))


def torch_folder(version: str) -> Path:
    """The headers of a torch and what a linker needs of it."""
    folder = FOLDER / "torch" / version
    folder.mkdir(parents=True, exist_ok=True)
    return toolkit.unpacked(toolkit.download(f"torch=={version}", folder), *NEEDED) / "torch"


def build(tools: Toolchain, folder: Path, out: Path) -> None:
    """The extension for all of them."""
    build_library(tools, folder, out)
    for version in TORCHES:
        build_module(tools, torch_folder(version), module_name(version), folder, out)
    build_module(tools, torch_folder(TORCHES[0]), STABLE, folder, out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m release.wheel", description=__doc__)
    parser.add_argument("--out", default="dist", help="folder of the wheel")
    options = parser.parse_args()
    start = time.monotonic()
    # Every file in the wheel says that it was made when the commit was.
    os.environ.setdefault("SOURCE_DATE_EPOCH", output("git", "log", "-1", "--format=%ct"))
    tools = toolkit.prepare(FOLDER / "toolkit")
    command = ["build", "--build-base", str(FOLDER / "build"), "bdist_wheel"]
    command += ["--plat-name", PLATFORM, "--dist-dir", options.out]
    setup(**arguments(lambda folder, out: build(tools, folder, out)), script_args=command)
    (wheel,) = Path(options.out).glob("*.whl")
    run("auditwheel", "show", str(wheel))
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB, in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
