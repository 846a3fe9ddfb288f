"""make kernels-hub: a folder as the Hugging Face kernels hub has it, for `kernels.get_local_kernel`.

    torch-stable-abi210-cu120-..., -cu130-...    the package with its CUDA extension, for torch built for CUDA 12 and 13
    torch-universal                             the package without it: Triton, and plain torch where that cannot run

Both are the package as it is, under a name of its own, so that its ops do not meet those of an installed one; and
layers.py, whose layers `kernelize` swaps in. Nothing is uploaded.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import fused_lora

from . import toolkit
from .commands import of_commit
from .wheel import FOLDER, build

LAYERS = Path(__file__).with_name("hub_layers.py")
CUDA_VARIANTS = ("torch-stable-abi210-cu120-x86_64-linux", "torch-stable-abi210-cu130-x86_64-linux")
UNIVERSAL = "torch-universal"
CARDS = ["8.0", "8.6", "8.9", "9.0a"]


def unique_name(backend: str) -> str:
    """Of a commit's kernels: of the module in Python, of its ops and of its library."""
    return f"_fused_lora_{backend}_{of_commit('%H')[:12]}"


def metadata(name: str, backend: dict) -> str:
    """As kernels reads it. Of the version the hub knows one number: the first of ours."""
    about = {
        "id": name,
        "name": "fused-lora",
        "version": int(fused_lora.__version__.split(".")[0]),
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": backend,
    }
    return json.dumps(about, indent=2) + "\n"


def copy_package(folder: Path, name: str, backend: dict) -> None:
    """The package's own files, the layers among them."""
    package = Path(fused_lora.__file__).parent
    shutil.copytree(package, folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(LAYERS, folder / "layers.py")
    (folder / "__init__.py").write_text(
        (package / "__init__.py").read_text() + "\nfrom . import layers  # noqa: E402\n"
    )
    (folder / "metadata.json").write_text(metadata(name, backend))


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m release.hub", description=__doc__, formatter_class=form)
    parser.add_argument("--out", type=Path, default=Path("dist/kernels-hub/build"))
    parser.add_argument("--universal", action="store_true", help="only torch-universal, which needs no compiler")
    options = parser.parse_args()
    for variant in (*CUDA_VARIANTS, UNIVERSAL):
        shutil.rmtree(options.out / variant, ignore_errors=True)
    copy_package(options.out / UNIVERSAL, unique_name("universal"), {"type": "cpu"})
    if not options.universal:
        first, *others = (options.out / variant for variant in CUDA_VARIANTS)
        name = unique_name("cuda")
        copy_package(first, name, {"type": "cuda", "archs": CARDS})
        build(toolkit.prepare(FOLDER / "toolkit"), FOLDER / "objects", first, name)
        for other in others:  # the same, for torch built for another CUDA
            shutil.copytree(first, other, copy_function=os.link)
    print("\n".join(f"wrote {path}" for path in sorted(options.out.iterdir())))


if __name__ == "__main__":
    main()
