"""make try-wheel: the wheel as a person meets it, in fresh environments that have nothing of this checkout.

In each: one version of torch, the wheel, what every module of the extension needs of that torch, what the doctor says,
and the tests, which find the installed package because they are copied to a folder without the sources.
"""

import argparse
import shutil
import sys
from pathlib import Path

from setup import STABLE

from .commands import run
from .wheel import FOLDER, TORCHES

COPIED = (
    "tests",
    "bench",
    "examples",
    "docs",
    "csrc",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "pyproject.toml",
    "setup.py",
)
# A module of the extension imported with a torch: its own one, or that of the stable ABI.
IMPORT = """
import importlib, sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import fused_lora
end = time.perf_counter()
assert "site-packages" in fused_lora.__file__, fused_lora.__file__
assert not torch.cuda.is_initialized()
from fused_lora.extension import module_name
name = sys.argv[1] if len(sys.argv) > 1 else module_name(torch.__version__)
module = importlib.import_module("fused_lora." + name)
assert module.rank_obstacle(16) == "" and "above" in module.rank_obstacle(1000)
print(f"{name} loads; import torch {middle - start:.2f} s, fused_lora {end - middle:.2f} s more")
"""


def fresh(version: str, wheel: Path) -> Path:
    """An environment with a torch, the wheel and what tests need; its Python."""
    folder = FOLDER / "environments" / version
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "venv", str(folder))
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet"]
    run(*install, f"torch=={version}", "triton")
    run(*install, f"{wheel}[test]", f"torch=={version}")
    return python.absolute()


def without_sources(folder: Path) -> Path:
    """The tests and what they read, without the package."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in COPIED:
        path = Path(name)
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, folder / name)
    return folder


def attempt(version: str, wheel: Path, tests: list[str]) -> None:
    python, folder = str(fresh(version, wheel)), without_sources(FOLDER / "tests")
    for module in ([], [STABLE]):
        run(python, "-c", IMPORT, *module, cwd=folder)
    run(python, "-m", "fused_lora.doctor", cwd=folder)
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "auto", *tests, cwd=folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m release.trial", description=__doc__)
    parser.add_argument("--torch", nargs="+", default=TORCHES, help="versions, as 2.12.1")
    parser.add_argument("--wheel", type=Path, help="the one in dist/")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="what pytest is given")
    options = parser.parse_args()
    found = options.wheel or next(Path("dist").glob("fused_lora-*.whl"), None)
    if found is None or not found.exists():
        parser.error("there is no wheel in dist/: make wheel first")
    for version in options.torch:
        print(f"\n== torch {version}", flush=True)
        attempt(version, found.absolute(), options.tests)


if __name__ == "__main__":
    main()
