"""Follows the source of a module's forward: the calls of its children, and what may change memory between them.

Instead of values it has what is known of them: which are None, which are the module, its children and functions that
get the module, and which memory a value may share. What cannot be followed counts as if it changed whatever it gets.
"""

import ast
import builtins
import inspect
import math
import textwrap
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType

import torch
from torch import nn

UNKNOWN = object()
MOST_DEPTH = 4  # of functions that call each other with the module
# Attributes and methods of a tensor whose results share no memory with it.
FACTS = {"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "size", "dim", "numel", "stride"}
PURE = {
    getattr(builtins, name)
    for name in (
        "bool",
        "dict",
        "enumerate",
        "float",
        "getattr",
        "hasattr",
        "int",
        "isinstance",
        "len",
        "list",
        "max",
        "min",
    )
}
PURE_MODULES = (torch, torch.nn.functional, math)


@dataclass(eq=False)
class Value:
    """What an expression gives: an object that is known, or one known by its identity alone."""

    known: object = UNKNOWN
    shares: frozenset["Value"] = frozenset()  # whose memory it may be, besides its own
    given: bool = False  # certainly not None

    @property
    def memory(self) -> frozenset["Value"]:
        return self.shares | {self}

    @property
    def truth(self) -> bool | None:
        """None where it is not known."""
        known = self.known
        return bool(known) if known is None or isinstance(known, (bool, int, str)) else None


@dataclass
class Called:
    """A child called with one value, in a branch; without a value, in a way that says nothing."""

    child: str
    value: Value | None
    path: tuple


class Follower:
    """Follows functions that get the module; `events` are calls of its children and sets of memory that may change."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.children = {id(child): name for name, child in module.named_children()}
        self.events: list[Called | frozenset] = []
        self.relies_on: dict[str, type] = {}
        self.path: tuple = ()
        self.depth = 0
        self.branches = 0
        self.tested: set[Value] = set()  # values that were compared with None, of which that was not known

    # Functions

    def call(self, function: FunctionType, args: list[Value], kwargs: dict[str, Value]) -> Value:
        """The function's result, its body followed."""
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        if not isinstance(tree, ast.FunctionDef):
            raise TypeError("no function")
        parameters = [each.arg for each in (*tree.args.posonlyargs, *tree.args.args)]
        names = [*parameters, *(each.arg for each in tree.args.kwonlyargs)]
        bound = dict(zip(parameters, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        scope = {name: bound.get(name) or Value() for name in names}
        for star in (tree.args.vararg, tree.args.kwarg):
            if star is not None:
                scope[star.arg] = Value(shares=_memory([*args, *kwargs.values()]))
        outer, self.globals = getattr(self, "globals", None), function.__globals__
        path, self.depth = self.path, self.depth + 1
        self.block(tree.body, scope)
        self.globals, self.path, self.depth = outer, path, self.depth - 1
        return Value(shares=_memory([*args, *kwargs.values()]))

    def may_change(self, values: list[Value]) -> None:
        memory = _memory(values)
        if memory:
            self.events.append(memory)

    def used(self, value: Value) -> None:
        """A child in a place where nothing is known of what becomes of it."""
        name = self.children.get(id(value.known))
        if name is not None:
            self.events.append(Called(name, None, self.path))

    # Statements. Each returns whether what follows in the block is reached.

    def block(self, statements: list[ast.stmt], scope: dict[str, Value]) -> bool:
        return all(self.statement(statement, scope) for statement in statements)

    def statement(self, node: ast.stmt, scope: dict[str, Value]) -> bool:
        method = getattr(self, f"on_{type(node).__name__}", None)
        if method is None:
            self.opaque(node, scope)
            return True
        return method(node, scope) is not False

    def on_Pass(self, node, scope):
        pass

    def on_Expr(self, node, scope):
        self.value(node.value, scope)

    def on_Return(self, node, scope):
        if node.value is not None:
            self.value(node.value, scope)
        return False

    def on_Raise(self, node, scope):
        return False

    def on_Assert(self, node, scope):
        self.value(node.test, scope)

    def on_Assign(self, node, scope):
        self.assign(node.targets, node.value, scope)

    def on_AnnAssign(self, node, scope):
        if node.value is not None:
            self.assign([node.target], node.value, scope)

    def assign(self, targets, source, scope):
        value = self.value(source, scope)
        for target in targets:
            self.bind(target, value, scope)

    def bind(self, target, value: Value, scope):
        self.used(value)  # under another name a child is followed no further
        if isinstance(target, ast.Name):
            scope[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List, ast.Starred)):
            for each in target.elts if not isinstance(target, ast.Starred) else [target.value]:
                self.bind(each, Value(shares=value.memory), scope)
        else:  # an attribute or an entry: whose owner changes, and may be a view of another
            self.may_change([self.value(target.value, scope), value])

    def on_AugAssign(self, node, scope):
        self.value(node.value, scope)
        target = node.target if isinstance(node.target, ast.Name) else node.target.value
        self.may_change([self.value(target, scope)])

    def on_If(self, node, scope):
        truth = self.value(node.test, scope).truth
        if truth is not None:
            return self.block(node.body if truth else node.orelse, scope)
        ends, scopes = [], []
        for branch in (node.body, node.orelse):
            own = dict(scope)
            ends.append(self.branch(lambda branch=branch, own=own: self.block(branch, own)))
            scopes.append(own)
        reached = [own for own, goes_on in zip(scopes, ends, strict=True) if goes_on]
        if not reached:
            return False
        if len(reached) == 1 and not _only_raises(node.orelse if ends[0] else node.body):
            self.path = (*self.path, self.new_branch())  # what follows is not certain any more
        scope.update(_merged(reached))
        return True

    def on_With(self, node, scope):
        for item in node.items:
            value = self.value(item.context_expr, scope)
            if item.optional_vars is not None:
                self.bind(item.optional_vars, Value(shares=value.memory), scope)
        return self.branch(lambda: self.block(node.body, scope))

    def opaque(self, node: ast.AST, scope: dict[str, Value]) -> None:
        """Loops, functions and whatever else is not followed may change all that they name, and name anything anew."""
        for each in ast.walk(node):
            if isinstance(each, ast.Name):
                value = scope.get(each.id)
                if value is not None and isinstance(each.ctx, ast.Load):
                    self.may_change([value])
                if not isinstance(each.ctx, ast.Load):
                    scope[each.id] = Value(shares=_memory(scope.values()))
            if isinstance(each, ast.Attribute) and each.attr in self.module._modules:
                self.events.append(Called(each.attr, None, self.path))
            if isinstance(each, ast.FunctionDef):
                scope[each.name] = Value(shares=_memory(scope.values()))

    def branch(self, follow):
        outer, self.path = self.path, (*self.path, self.new_branch())
        result = follow()
        self.path = outer
        return result

    def new_branch(self) -> int:
        self.branches += 1
        return self.branches

    # Expressions

    def value(self, node: ast.expr, scope: dict[str, Value]) -> Value:
        method = getattr(self, f"of_{type(node).__name__}", None)
        if method is not None:
            return method(node, scope)
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda, ast.Await)):
            self.opaque(node, scope)
            return Value(shares=_memory(scope.values()))
        inner = [self.value(each, scope) for each in ast.iter_child_nodes(node) if isinstance(each, ast.expr)]
        for each in inner:
            self.used(each)
        return Value(shares=_memory(inner))

    def of_Constant(self, node, scope):
        return Value(known=node.value)

    def of_Name(self, node, scope):
        if node.id in scope:
            return scope[node.id]
        return Value(known=self.globals.get(node.id, getattr(builtins, node.id, UNKNOWN)))

    def of_Attribute(self, node, scope):
        owner = self.value(node.value, scope)
        if owner.known is self.module:
            return self.attribute(node.attr)
        if isinstance(owner.known, ModuleType):
            return Value(known=getattr(owner.known, node.attr, UNKNOWN))
        self.used(owner)  # another's weight, or forward
        return Value() if node.attr in FACTS else Value(shares=owner.memory)

    def attribute(self, name: str) -> Value:
        """Of the module: a child, or a function that can be followed."""
        held = vars(self.module).get(name) or self.module._modules.get(name)
        if isinstance(held, nn.Module) and id(held) in self.children:
            return Value(known=held)
        if held is None:
            function = inspect.getattr_static(type(self.module), name, None)
            if isinstance(function, FunctionType):
                return Value(known=MethodType(function, self.module))
        elif isinstance(getattr(type(held), "__call__", None), FunctionType):  # noqa: B004  its code, not whether it has any
            self.relies_on[name] = type(held)
            return Value(known=MethodType(type(held).__call__, held))
        return Value()

    def of_Compare(self, node, scope):
        values = [self.value(each, scope) for each in (node.left, *node.comparators)]
        if len(values) == 2 and isinstance(node.ops[0], (ast.Is, ast.IsNot)) and values[1].known is None:
            same = True if values[0].known is None else False if _is_given(values[0]) else None
            if same is not None:
                return Value(known=same == isinstance(node.ops[0], ast.Is))
            self.tested.add(values[0])
        return Value()

    def of_UnaryOp(self, node, scope):
        value = self.value(node.operand, scope)
        if isinstance(node.op, ast.Not) and value.truth is not None:
            return Value(known=not value.truth)
        return Value(shares=value.memory)

    def of_BoolOp(self, node, scope):
        decides = isinstance(node.op, ast.Or)
        uncertain, outer, seen = False, self.path, []
        for each in node.values:
            value = self.value(each, scope)
            seen.append(value)
            if value.truth is decides and not uncertain:
                break
            if value.truth is None and not uncertain:
                uncertain, self.path = True, (*self.path, self.new_branch())
        self.path = outer
        if any(value.truth is decides for value in seen):
            return Value(known=decides)
        return seen[-1] if not uncertain else Value(shares=_memory(seen))

    def of_IfExp(self, node, scope):
        truth = self.value(node.test, scope).truth
        if truth is not None:
            return self.value(node.body if truth else node.orelse, scope)
        values = [self.branch(lambda each=each: self.value(each, scope)) for each in (node.body, node.orelse)]
        return Value(shares=_memory(values))

    def of_NamedExpr(self, node, scope):
        value = self.value(node.value, scope)
        self.bind(node.target, value, scope)
        return value

    def of_Call(self, node, scope):
        function, owner = self.callee(node.func, scope)
        args = [self.value(each, scope) for each in node.args]
        kwargs = {each.arg: self.value(each.value, scope) for each in node.keywords}
        given = [*args, *kwargs.values()]
        for each in given:
            self.used(each)
        name = self.children.get(id(function.known))
        if name is not None:
            return self.child(name, node, given)
        if self.follows(function.known, given):
            return self.followed(function.known, args, {k: v for k, v in kwargs.items() if k is not None})
        if owner is None:
            if not _is_pure(function.known, given, kwargs):
                self.may_change([*given, function])
            return Value(shares=_memory([*given, function]))
        if node.func.attr in FACTS:
            return Value()
        # By torch's names, a method that changes its tensor ends in "_". Of what it is given nothing is known.
        self.may_change([*given, owner] if node.func.attr.endswith("_") else given)
        return Value(shares=_memory([*given, owner]))

    def callee(self, node, scope) -> tuple[Value, Value | None]:
        """What is called; and where that is a method of something unknown, of what."""
        if not isinstance(node, ast.Attribute):
            return self.value(node, scope), None
        owner = self.value(node.value, scope)
        if owner.known is self.module or isinstance(owner.known, ModuleType):
            return self.of_Attribute(node, scope), None
        self.used(owner)
        return Value(), owner

    def child(self, name: str, node: ast.Call, given: list[Value]) -> Value:
        """A linear's result shares nothing; of another child's nothing is known."""
        plain = len(given) == 1 and not isinstance(next(iter(node.args), None), ast.Starred)
        if plain and None not in {each.arg for each in node.keywords} and isinstance(given[0], Value):
            self.events.append(Called(name, given[0], self.path))
        else:
            self.events.append(Called(name, None, self.path))
        if isinstance(self.module._modules[name], nn.Linear) or hasattr(self.module._modules[name], "part"):
            return Value()
        self.may_change(given)
        return Value(shares=_memory(given))

    def follows(self, function, given: list[Value]) -> bool:
        """Whether it is Python's and gets the module."""
        gets = isinstance(function, MethodType) and function.__self__ is self.module
        gets = gets or any(value.known is self.module for value in given)
        plain = isinstance(function, (MethodType, FunctionType))
        return gets and plain and self.depth < MOST_DEPTH and _has_source(inspect.unwrap(function))

    def followed(self, function, args: list[Value], kwargs: dict[str, Value]) -> Value:
        if isinstance(function, MethodType):
            args = [Value(known=function.__self__), *args]
        return self.call(inspect.unwrap(getattr(function, "__func__", function)), args, kwargs)


def _memory(values) -> frozenset[Value]:
    """All that the values may share; constants and functions are no tensors."""
    return frozenset().union(*(value.memory for value in values if value.known is UNKNOWN))


def _merged(scopes: list[dict[str, Value]]) -> dict[str, Value]:
    """Names after branches: of which each may be what one of them made it."""
    names = set().union(*scopes)
    found = {name: [scope[name] for scope in scopes if name in scope] for name in names}
    return {
        name: values[0] if all(value is values[0] for value in values) else Value(shares=_memory(values))
        for name, values in found.items()
    }


def _only_raises(block: list[ast.stmt]) -> bool:
    return bool(block) and isinstance(block[-1], ast.Raise)


def _is_given(value: Value) -> bool:
    return value.given or (value.known is not UNKNOWN and value.known is not None)


def _is_pure(function, given: list[Value], kwargs: dict) -> bool:
    """Whether it changes nothing: some of Python's own, and torch's functions but for those that are told to."""
    name = getattr(function, "__name__", "_")
    told = "out" in kwargs or "inplace" in kwargs or any(value.known is True for value in given)
    if any(function is each for each in PURE):
        return True
    return not name.endswith("_") and not told and any(getattr(each, name, None) is function for each in PURE_MODULES)


def _has_source(function) -> bool:
    try:
        return bool(inspect.getsource(function))
    except (OSError, TypeError):
        return False
