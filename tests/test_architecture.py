"""The house: who may import whom, what may not happen at import, and that files stay short and names documented."""

import ast
import inspect
import itertools
from pathlib import Path

import pytest

import fused_lora

PACKAGE = Path(fused_lora.__file__).parent
FILES = list(PACKAGE.rglob("*.py"))
MAX_LINES = 300

# The rooms of the package, and for each the rooms whose lines it may import. Leaves may import none.
ROOMS = {
    "checks": {"formats"},
    "hashing": set(),
    "reference": {"formats", "hashing"},
    "segments": {"formats", "reference", "hashing"},
    "formats": {"hashing"},
    "padding": set(),
    "extras": set(),
    "whole_files": set(),
    "measured_file": set(),
    "recent": set(),
    "layout": set(),
    "cards": set(),
    "predict": {"cards"},
    "explanations": {"predict"},
    "kernels": {"cards", "formats", "checks", "reference", "segments", "padding", "measured_file", "recent", "layout"},
    "extension": set(),
    "backends": {"extension", "kernels"},
    "choices": {"backends", "formats", "measured_file"},
    "addmm": {"formats", "reference"},
    "ops": {
        "segments",
        "addmm",
        "backends",
        "choices",
        "formats",
        "kernels",
        "checks",
        "reference",
        "padding",
        "recent",
        "layout",
    },
    "modules": {"segments", "formats", "ops", "checks", "reference", "padding", "whole_files"},
    "relora": {"modules", "ops", "checks", "reference", "formats"},
    "adapters": {"modules", "ops", "segments", "checks", "whole_files"},
    "tasks": {"adapters", "relora", "modules", "checks", "whole_files"},
    "pretrain": {"extras", "whole_files", "relora", "modules", "ops", "checks", "reference"},
    "integrations": {"whole_files", "relora", "modules", "segments", "ops", "checks", "reference"},
    "explain_banks": {"explanations", "modules", "segments", "backends", "choices", "kernels"},
    "explain": {
        "explanations",
        "explain_banks",
        "modules",
        "ops",
        "segments",
        "backends",
        "choices",
        "kernels",
        "predict",
        "cards",
        "checks",
    },
    "doctor": {"__init__", "backends", "choices"},
    "tune": {"integrations", "ops", "backends", "choices", "checks", "extras"},
    "__init__": {"adapters", "integrations", "relora", "modules", "ops", "explain"},
}
LAZY = {"kernels"}
TRITON_ROOMS = {"kernels", "backends"}
NOT_AT_IMPORT = ("torch.cuda", "torch.compile", "triton.compile", "os.environ", "os.getenv")
# Who may read the environment; the second one sets a variable of cuBLAS.
ENVIRONMENT = {"backends.py", "pretrain/repeatable.py"}
PROPERTIES = {"get_device_capability", "get_device_properties", "get_device_name"}
OUTSIDE = {"tests", "bench", "examples"}
STRANGERS = {"peft", "transformers", "accelerate"}


def room_of(path):
    """The first part of a file's path inside the package; its stem where it lies at the top."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def resolve(node, path):
    """The dotted names that an import statement brings in, relative ones spelled out."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    folder = ("fused_lora", *path.relative_to(PACKAGE).parts[:-1])
    base = ".".join(folder[: len(folder) + 1 - node.level]) if node.level else ""
    module = ".".join(part for part in (base, node.module) if part)
    return [f"{module}.{alias.name}" for alias in node.names]


def walk(path):
    """(node, whether it runs at import) of a file: bodies of functions do not; their decorators and defaults do."""

    def visit(node, at_import):
        yield node, at_import
        for field, value in ast.iter_fields(node):
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and field == "body"
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child, at_import and not inside)

    yield from visit(ast.parse(path.read_text()), True)


def imports(path):
    """(dotted name, whether at import) of everything a file imports."""
    for node, at_import in walk(path):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((name, at_import) for name in resolve(node, path))


def dotted(node):
    """os.environ.get as text; None for what is not a chain of names."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def violations(path):
    """Every line of a file that the rules forbid, in words."""
    room = room_of(path)
    asks = path.relative_to(PACKAGE).as_posix() in ENVIRONMENT
    for name, at_import in imports(path):
        top, *rest = name.split(".")
        if top == "fused_lora":
            other = rest[0] if rest and rest[0] in ROOMS else "__init__"
            if other != room and other not in ROOMS[room]:
                yield f"{room} imports {name}"
            if other in LAZY and room != other and at_import:
                yield f"{name} is imported at import, which not every machine can"
        elif top in OUTSIDE or (top in STRANGERS and room != "integrations"):
            yield f"{room} imports {name}"
        elif top == "triton" and (room not in TRITON_ROOMS or (room == "backends" and at_import)):
            yield f"{room} imports {name}, which CPU builds of torch lack"
        elif not asks and name.split(".")[:2] in (["os", "environ"], ["os", "getenv"]):
            yield f"{room} reads the environment"
    for node, at_import in walk(path):
        name = dotted(node) if isinstance(node, ast.Attribute) else None
        if name and not asks and name.startswith(("os.environ", "os.getenv")):
            yield f"{room} reads the environment"
        if name and room != "backends" and name.rpartition(".")[2] in PROPERTIES:
            yield f"{room} reads a device's properties"
        if name and at_import and name.startswith(NOT_AT_IMPORT):
            yield f"{name} at import"


def files(**marks):
    """Every file as a parameter, those named by stem with their marks."""
    return [
        pytest.param(path, id=str(path.relative_to(PACKAGE)), marks=marks.get(path.stem, ())) for path in sorted(FILES)
    ]


@pytest.mark.parametrize("path", files())
def test_rules(path):
    assert room_of(path) in ROOMS, "a new room needs its arrows"
    assert sorted(set(violations(path))) == []


def unspoken_loads(path):
    """Lines of torch.load without a word about what may be unpickled."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    loads = [call for call in calls if dotted(call.func) == "torch.load"]
    return [call.lineno for call in loads if "weights_only" not in {keyword.arg for keyword in call.keywords}]


@pytest.mark.parametrize("room", ["fused_lora", "bench", "examples", "tests"])
def test_every_load_says_what_it_allows(room):
    assert [path for path in (PACKAGE.parent / room).rglob("*.py") if unspoken_loads(path)] == []


def test_a_load_that_does_not_say_is_found(tmp_path):
    (tmp_path / "one.py").write_text("import torch\ntorch.load('x', weights_only=True)\ntorch.load('y')\n")
    assert unspoken_loads(tmp_path / "one.py") == [3]


@pytest.mark.parametrize("path", files())
def test_length(path):
    assert len(path.read_text().splitlines()) < MAX_LINES


@pytest.mark.parametrize(("file", "line"), [
    ("reference.py", "import triton"),
    ("reference.py", "from . import checks"),
    ("reference.py", "from .ops import merge_"),
    ("checks.py", "from .backends import choose"),
    ("checks.py", "import fused_lora"),
    ("kernels/shrink.py", "from ..ops import lora_linear"),
    ("kernels/shrink.py", "from ..ops.merge import merge_"),
    ("kernels/shrink.py", "def f():\n    from .. import backends"),
    ("kernels/shrink.py", "import os\nos.environ.get('X')"),
    ("kernels/shrink.py", "import torch\ntorch.cuda.get_device_properties(0)"),
    ("ops/merge.py", "from ..modules import LoRALinear"),
    ("ops/merge.py", "from ..kernels.merge import merge_"),
    ("ops/merge.py", "from ..extension import load"),
    ("ops/merge.py", "import triton.language as tl"),
    ("ops/merge.py", "import os\ndef f():\n    return os.getenv('X')"),
    ("ops/merge.py", "from os import environ"),
    ("ops/merge.py", "import torch\n@torch.compile\ndef f(): pass"),
    ("modules/replace.py", "def f():\n    import triton"),
    ("modules/replace.py", "def f():\n    from ..kernels import tiles"),
    ("modules/replace.py", "from peft import LoraConfig"),
    ("modules/replace.py", "import torch\nX = torch.cuda.is_available()"),
    ("modules/replace.py", "import torch\ndef f(x=torch.cuda.current_device()): pass"),
    ("modules/replace.py", "import torch\nclass C:\n    x = torch.cuda.device_count()"),
    ("modules/replace.py", "import torch\ndef f():\n    return torch.cuda.get_device_capability()"),
    ("backends.py", "from . import ops"),
    ("backends.py", "import triton"),
    ("backends.py", "from .kernels.tiles import Gpu"),
    ("backends.py", "import os\nX = os.environ.get('FUSED_LORA_BACKEND')"),
    ("explain.py", "from tests.accuracy import assert_accurate"),
    ("explain.py", "def f():\n    import bench"),
    ("__init__.py", "from examples.demo import main"),
])  # fmt: skip
def test_the_rules_can_fail(file, line, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: line)
    assert list(violations(PACKAGE / file))


@pytest.mark.parametrize(("file", "line"), [
    ("ops/merge.py", "def f():\n    from ..kernels.merge import merge_"),
    ("ops/library.py", "import torch\ndef f():\n    torch.cuda.current_device()"),
    ("ops/merge.py", "from .. import backends, checks, reference"),
    ("backends.py", "def f():\n    import os, triton\n    return os.environ"),
    ("modules/replace.py", "from .lora_linear import LoRALinear\nfrom .. import checks, ops"),
    ("kernels/shrink.py", "import triton\nfrom .launch import launch\nfrom . import tiles"),
])  # fmt: skip
def test_the_rules_allow(file, line, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: line)
    assert list(violations(PACKAGE / file)) == []


def test_the_arrows_have_no_cycle():
    for first, second in itertools.combinations(ROOMS, 2):
        assert not (second in ROOMS[first] and first in ROOMS[second])
    settled = set()
    while len(settled) < len(ROOMS):
        free = {room for room in ROOMS if room not in settled and ROOMS[room] <= settled}
        assert free, f"a cycle among {set(ROOMS) - settled}"
        settled |= free


INHERITED = {"forward", "extra_repr"}  # their meaning is nn.Module's


def public_objects():
    """Everything in __all__, and the public methods of its classes."""
    for name in fused_lora.__all__:
        thing = getattr(fused_lora, name)
        yield name, thing
        if inspect.isclass(thing):
            own = {method for method, value in vars(thing).items() if inspect.isroutine(value) and method[0] != "_"}
            yield from ((f"{name}.{method}", getattr(thing, method)) for method in sorted(own - INHERITED))


@pytest.mark.parametrize(("name", "thing"), [pytest.param(*each, id=each[0]) for each in public_objects()])
def test_public_names_are_documented(name, thing):
    documentation = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    assert documentation, name
    # A dataclass without a docstring gets its signature for one.
    assert not documentation.startswith(f"{name}("), name


@pytest.mark.parametrize("path", files())
def test_modules_are_documented(path):
    assert not path.read_text() or ast.get_docstring(ast.parse(path.read_text()))


def test_all_names_exist_once_and_sorted_out():
    assert len(set(fused_lora.__all__)) == len(fused_lora.__all__)
    assert all(hasattr(fused_lora, name) for name in fused_lora.__all__)
