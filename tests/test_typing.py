"""mypy takes a user's program, in its strictest form: the package says that it is typed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fused_lora

pytest.importorskip("mypy")
ROOT = Path(fused_lora.__file__).parent.parent


@pytest.mark.timeout(600)
def test_a_users_program(tmp_path):
    program = Path(__file__).parent / "typed_user.py"
    # As of an installed package, errors inside of it are its own affair.
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", tmp_path, program]
    installed = "site-packages" in ROOT.parts  # where mypy looks by itself
    env = os.environ | ({} if installed else {"MYPYPATH": str(ROOT)})
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
