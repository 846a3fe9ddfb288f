"""weight_readers: which modules read the weight of a layer below them instead of calling it.

An update beside the weight would be left out there without a word, and merging it would change the output. Read off the
source of the modules' methods: no names of layers or classes are known here.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType, MethodType

from torch import nn

Path = tuple[str, ...]  # of attributes from self; EACH is any child
EACH = "*"
# What can be asked of a weight without its values.
METADATA = {
    "dtype", "device", "layout", "shape", "ndim", "size", "dim", "numel", "stride", "element_size", "requires_grad",
    "is_floating_point", "is_cuda", "is_cpu", "is_meta", "is_contiguous", "type", "grad", "__class__",
}  # fmt: skip
INSPECTIONS = {"isinstance", "hasattr", "type", "id", "len"}


def weight_readers(model: nn.Module) -> dict[int, str]:
    """The method that reads it, for the id of each module whose weight is read by a module above it.

    Methods that compute no gradients and that no forward comes to prepare a model for something else, and do not count.
    """
    readers: dict[int, str] = {}
    used = _used_in_forwards({type(module) for module in model.modules()})
    for module in model.modules():
        for method, path in (*_reads_of_class(type(module), used), *_reads_of_instance(module)):
            for child in _children(module, path):
                readers.setdefault(id(child), method)
    return readers


def _used_in_forwards(classes: set[type]) -> frozenset[str]:
    """Names of methods that a forward may come to, its own and those of whatever it calls."""
    named: dict[str, set[str]] = {}
    for cls in classes:
        for _, name, member in _members(cls):
            function = _function(member)
            if function is not None:
                named.setdefault(name, set()).update(_names(function.__code__))
    used, new = set(), {"forward", "__call__"}
    while new:
        used |= new
        new = set().union(*(named[name] for name in new if name in named)) - used
    return frozenset(used)


def _children(module: nn.Module, path: Path) -> list[nn.Module]:
    found = [module]
    for part in path:
        found = [
            child
            for parent in found
            for name, child in parent._modules.items()
            if child is not None and part in (name, EACH)
        ]
    return found


@cache
def _reads_of_class(cls: type, used: frozenset[str]) -> tuple[tuple[str, Path], ...]:
    """Of its methods and those it inherits. What __init__ reads, it reads before any replacement."""
    return tuple(
        (f"{base.__name__}.{name}", path)
        for base, name, member in _members(cls)
        for path in _reads(member)
        if name in used or not _without_gradients(_function(member))
    )


def _members(cls: type) -> Iterator[tuple[type, str, object]]:
    for base in cls.__mro__:
        if base not in nn.Module.__mro__:
            yield from ((base, name, member) for name, member in vars(base).items() if name != "__init__")


def _without_gradients(function: FunctionType) -> bool:
    """Whether a decorator says so."""
    try:
        lines = inspect.getsource(function).partition("def ")[0]
    except (OSError, TypeError):
        return False
    return "no_grad" in lines or "inference_mode" in lines


def _reads_of_instance(module: nn.Module) -> list[tuple[str, Path]]:
    """Of methods that were put on the module itself."""
    own = [(name, value) for name, value in vars(module).items() if isinstance(value, (FunctionType, MethodType))]
    return [(f"{type(module).__name__}.{name}", path) for name, value in own for path in _reads(value)]


def _reads(member) -> tuple[Path, ...]:
    function = _function(member)
    return () if function is None else _reads_of_function(function)


def _function(member) -> FunctionType | None:
    """The innermost one of a method or a property."""
    if isinstance(member, property):
        member = member.fget
    member = inspect.unwrap(getattr(member, "__func__", member))
    return member if isinstance(member, FunctionType) else None


@cache
def _reads_of_function(function: FunctionType) -> tuple[Path, ...]:
    """Paths from its first argument to the modules whose weight it reads."""
    names = _names(function.__code__)
    if "weight" not in names:
        return ()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):  # without its source: every child that it names may be read
        return tuple((name,) for name in names)
    if not isinstance(tree, ast.FunctionDef) or not tree.args.args:
        return ()
    return tuple(dict.fromkeys(_Source(tree).reads()))


def _names(code: CodeType) -> list[str]:
    """Attributes and globals of a function and of those inside it."""
    inner = [name for constant in code.co_consts if isinstance(constant, CodeType) for name in _names(constant)]
    return [*code.co_names, *inner]


class _Source:
    """A method's tree, and what its local names stand for: paths from self."""

    def __init__(self, method: ast.FunctionDef):
        self.nodes = list(ast.walk(method))
        self.parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}
        self.aliases: dict[str, set[Path]] = {method.args.args[0].arg: {()}}
        for _ in range(2):  # the walk goes by depth: a name can be used before it is met
            for node in self.nodes:
                self._name(node)

    def reads(self) -> Iterator[Path]:
        for node in self.nodes:
            if isinstance(node, ast.Attribute) and node.attr == "weight" and self._takes_values(node):
                yield from (path for path in self._paths(node.value) if path)

    def _name(self, node: ast.AST) -> None:
        """What an assignment or a loop calls a module."""
        if isinstance(node, (ast.Assign, ast.NamedExpr)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            paths = self._paths(node.value)
        elif isinstance(node, (ast.For, ast.comprehension)):
            targets, paths = [node.target], {(*path, EACH) for path in self._looped(node.iter)}
        else:
            return
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Name):
                    self.aliases.setdefault(part.id, set()).update(paths)

    def _looped(self, iterated: ast.expr) -> set[Path]:
        """The modules that a loop goes over, through zip, enumerate, .values() and the like."""
        if not isinstance(iterated, ast.Call):
            return self._paths(iterated)
        method = [iterated.func.value] if isinstance(iterated.func, ast.Attribute) else []
        return set().union(*map(self._looped, (*method, *iterated.args)))

    def _paths(self, node: ast.expr) -> set[Path]:
        """What an expression may stand for."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, set())
        if isinstance(node, ast.Attribute):
            return {(*path, node.attr) for path in self._paths(node.value)}
        if isinstance(node, ast.Subscript):
            key = node.slice.value if isinstance(node.slice, ast.Constant) else EACH
            return {(*path, key if isinstance(key, str) else EACH) for path in self._paths(node.value)}
        if isinstance(node, (ast.Tuple, ast.List)):
            return set().union(*map(self._paths, node.elts))
        if isinstance(node, ast.IfExp):
            return self._paths(node.body) | self._paths(node.orelse)
        return set()

    def _takes_values(self, node: ast.expr) -> bool:
        """Not where it is written, initialised, compared with None, or asked for its dtype."""
        if not isinstance(node.ctx, ast.Load):
            return False
        parent = self.parents[node]
        if isinstance(parent, ast.Attribute):
            if parent.attr == "data":
                return self._takes_values(parent)
            return parent.attr not in METADATA and not _in_place(parent.attr)
        if isinstance(parent, ast.Subscript) and parent.value is node:
            return isinstance(parent.ctx, ast.Load)
        if isinstance(parent, ast.Compare):
            return not all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in parent.ops)
        if isinstance(parent, ast.Call):
            name = getattr(parent.func, "attr", getattr(parent.func, "id", ""))
            first = parent.args and parent.args[0] is node
            return not (first and (name in INSPECTIONS or _in_place(name)))
        return True


def _in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")
