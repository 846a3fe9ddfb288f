"""Other programs, which must succeed."""

import subprocess


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def output(*command: str) -> str:
    """What one prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
