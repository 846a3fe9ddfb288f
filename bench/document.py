"""What results are made into: Markdown, and the files of a folder."""

from collections.abc import Callable
from pathlib import Path


def described(about: dict) -> str:
    """The circumstances of a measurement (record.circumstances) as a sentence."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
    commit = f", commit {about['commit']}" if about.get("commit") else ""
    return f"{about['device']}, {about['dtype']}, {about['date']}; {versions}{commit}."


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def write_files(folder: Path, texts: dict[str, str], pictures: dict[str, Callable[[Path], None]]) -> list[Path]:
    """Texts and, where matplotlib is installed, pictures by their files' names; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    written = [folder / name for name in texts]
    for name, draw in pictures.items():
        try:
            draw(folder / name)
        except ModuleNotFoundError as error:
            print(f"no {name}: {error}. Later, elsewhere: --redraw with the JSON file beside it")
        else:
            written.append(folder / name)
    return written
