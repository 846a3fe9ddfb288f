"""Other programs, which must succeed."""

import os
import subprocess
import sys
from pathlib import Path

# Those of this environment, which need not be activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run(*command: str, cwd: Path | None = None) -> None:
    subprocess.run(command, check=True, cwd=cwd)


def output(*command: str, cwd: Path | None = None) -> str:
    """What one prints."""
    return subprocess.run(command, check=True, cwd=cwd, stdout=subprocess.PIPE, text=True).stdout.strip()


def of_commit(what: str) -> str:
    """Of the checkout's commit, in git log's words."""
    try:
        return output("git", "log", "-1", f"--format={what}")
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit(
            "a checkout by git is needed, whose commit says how old files are and how they are named"
        ) from None
