"""What results are made into: Markdown, JSON, and the files of a folder."""

import json
from collections.abc import Callable
from pathlib import Path


def described(about: dict) -> str:
    """The circumstances of a measurement (record.circumstances) as a sentence."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
    commit = f", commit {about['commit']}" if about.get("commit") else ""
    return f"{about['device']}, {about['dtype']}, {about['date']}; {versions}{commit}."


def common(runs: list[dict]) -> dict:
    """The first of several runs, with the commands of all, and no cases yet. Raises ValueError where they differ in
    more than their cases and dates."""
    about = {key: value for key, value in runs[0].items() if key not in ("cases", "date", "command")}
    for run in runs:
        for key, value in about.items():
            if run[key] != value:
                raise ValueError(f"runs must have one {key}, got {value} and {run[key]}")
    return runs[0] | {"command": "; ".join(dict.fromkeys(run["command"] for run in runs)), "cases": []}


def redraw(paths: list[Path], out: Path | None, merged: Callable, write: Callable) -> None:
    """Writes the tables and pictures of runs' JSON files, as one, into a folder: by default the first one's."""
    results = merged([json.loads(path.read_text()) for path in paths])
    print("\n".join(f"wrote {path}" for path in write(results, out or paths[0].parent)))


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def as_json(results: dict) -> str:
    """A line for each case, without its samples: these change with every run, and `--samples` keeps them elsewhere."""
    return _lines(_without_samples(results), "") + "\n"


def write_samples(results: dict, path: Path | None) -> None:
    """Results with every sample, where somebody asks for them."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results) + "\n")


def _without_samples(value):
    if isinstance(value, dict):
        return {key: _without_samples(child) for key, child in value.items() if key not in ("samples", "samples_us")}
    return [_without_samples(child) for child in value] if isinstance(value, list | tuple) else value


def _lines(value, indent: str) -> str:
    """What holds only texts, numbers and lists of them is one line; what holds more has a line for each."""
    if _is_a_line(value):
        return json.dumps(value)
    inner = indent + " "
    names = [f"{json.dumps(name)}: " for name in value] if isinstance(value, dict) else [""] * len(value)
    parts = [f"{inner}{name}{_lines(child, inner)}" for name, child in zip(names, _children(value), strict=True)]
    first, last = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([first, ",\n".join(parts), indent + last])


def _is_a_line(value) -> bool:
    return not any(isinstance(child, dict) or not _is_a_line(child) for child in _children(value))


def _children(value) -> list:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


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
