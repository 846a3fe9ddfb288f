"""Programs without their extras say what to install."""

import subprocess
import sys

import pytest

from fused_lora.extras import needs

PROGRAMS = [
    ("fused_lora.pretrain", "pretrain", "numpy"),
    ("examples.demo", "demo", "matplotlib"),
    ("examples.many", "demo", "tqdm"),
    ("examples.table1", "pretrain", "tokenizers"),
    ("bench.steps", "bench", "tqdm"),
    ("fused_lora.tune", "tune", "tqdm"),
]


@pytest.mark.parametrize(("program", "extra", "missing"), PROGRAMS)
def test_a_program_names_its_extra(program, extra, missing):
    script = (
        "import runpy, sys\n"
        f"sys.modules[{missing!r}] = None\n"
        f"sys.argv = [{program!r}, '--help']\n"
        f"runpy.run_module({program!r}, run_name='__main__', alter_sys=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    line = result.stderr.splitlines()[-1]  # torch has its own to say about a missing NumPy
    assert missing in line
    assert line.endswith(f"it comes with pip install 'fused_lora[{extra}]' ('.[{extra}]' in a clone)")


@pytest.mark.parametrize("name", ["fused_lora.nowhere", "examples.nowhere", None])
def test_what_is_our_own_is_no_extra(name):
    with pytest.raises(ModuleNotFoundError), needs("demo"):
        raise ModuleNotFoundError("a mistake", name=name)
