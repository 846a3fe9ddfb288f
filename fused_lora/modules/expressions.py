"""Expressions of a forward that is followed: what they give, what they may change, and which children they call."""

import ast
import builtins
import inspect
import math
from types import FunctionType, MethodType, ModuleType

import torch
from torch import nn

from .protocol import is_bank, is_lora
from .values import UNKNOWN, Called, Value, is_given, link, memory_of

# Attributes and methods of a tensor whose results share no memory with it.
FACTS = {"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "size", "dim", "numel", "stride"}
PURE = {
    getattr(builtins, name)
    for name in (
        "bool",
        "dict",
        "enumerate",
        "float",
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
# Arguments by which they change another, or call something.
TELLING = {"out", "inplace", "key", "max_norm"}
CONSTANTS = (bool, int, float, str, torch.dtype, torch.device)
# By which an object's own code is called without a call.
OPERATORS = {
    f"__{name}__"
    for name in (
        *("getitem", "setitem", "contains", "iter", "len", "bool", "enter", "exit", "getattr", "getattribute"),
        *("add", "sub", "mul", "truediv", "matmul", "pow", "and", "or", "lt", "gt", "le", "ge", "neg", "invert"),
        *("radd", "rsub", "rmul", "rtruediv", "rmatmul", "iadd", "imul"),
    )
}


class Expressions:
    """The part of following.Follower that evaluates; scopes are names of a function and what they stand for."""

    module: nn.Module
    children: dict[int, str]
    function: FunctionType
    kept: Value
    path: tuple

    def value(self, node: ast.expr, scope: dict[str, Value]) -> Value:
        method = getattr(self, f"of_{type(node).__name__}", None)
        if method is not None:
            return method(node, scope)
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda, ast.Await)):
            self.opaque(node, scope)
            return Value(shares=memory_of(scope.values()))
        inner = [self.value(each, scope) for each in ast.iter_child_nodes(node) if isinstance(each, ast.expr)]
        for each in inner:
            self.used(each)
        return Value(shares=memory_of(inner))

    def of_Constant(self, node, scope):
        return Value(known=node.value)

    def of_Name(self, node, scope):
        if node.id in scope:
            return scope[node.id]
        if node.id in self.function.__code__.co_freevars:
            return Value(shares=self.kept.memory)
        found = self.function.__globals__.get(node.id, getattr(builtins, node.id, UNKNOWN))
        return self.outside(found)

    def outside(self, found) -> Value:
        """Of a module's names functions and modules are known; anything else may be another thing when it is called."""
        stays = callable(found) or isinstance(found, ModuleType)
        return Value(known=found) if stays else Value(shares=self.kept.memory)

    def of_Attribute(self, node, scope):
        owner = self.value(node.value, scope)
        if owner.known is self.module:
            return self.attribute(node.attr)
        if isinstance(owner.known, ModuleType):
            return self.outside(getattr(owner.known, node.attr, UNKNOWN))
        self.used(owner)  # another's weight, or forward
        return Value() if node.attr in FACTS else Value(shares=(self.kept if owner.is_known else owner).memory)

    def attribute(self, name: str) -> Value:
        """Of the module: a child, or a function that can be followed."""
        if name in ("_modules", "__dict__"):
            self.all_used()
        held = vars(self.module).get(name, self.module._modules.get(name))
        if isinstance(held, nn.Module) and id(held) in self.children:
            return Value(known=held)
        if held is None:
            function = inspect.getattr_static(type(self.module), name, None)
            if isinstance(function, FunctionType):
                return Value(known=MethodType(function, self.module))
            if isinstance(function, property):
                return self.of_property(function)
        elif isinstance(getattr(type(held), "__call__", None), FunctionType):  # noqa: B004  its code, not whether it has any
            self.relies_on[name] = type(held)
            return Value(known=MethodType(type(held).__call__, held))
        if _has_operators(held):
            self.may_change([self.kept])
        return Value() if isinstance(held, CONSTANTS) else Value(shares=self.kept.memory)

    def of_property(self, found: property) -> Value:
        getter = MethodType(found.fget, self.module)
        if self.follows(getter, []):
            return self.followed(getter, [], {}, [])
        self.all_used()
        self.may_change([self.kept])
        return Value(shares=self.kept.memory)

    def of_Compare(self, node, scope):
        values = [self.value(each, scope) for each in (node.left, *node.comparators)]
        if len(values) == 2 and isinstance(node.ops[0], (ast.Is, ast.IsNot)) and values[1].known is None:
            same = True if values[0].known is None else False if is_given(values[0]) else None
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
        return seen[-1] if not uncertain else Value(shares=memory_of(seen))

    def of_IfExp(self, node, scope):
        truth = self.value(node.test, scope).truth
        if truth is not None:
            return self.value(node.body if truth else node.orelse, scope)
        values = [self.branch(lambda each=each: self.value(each, scope)) for each in (node.body, node.orelse)]
        return Value(shares=memory_of(values))

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
        if function.known is getattr and args[0].known is self.module and isinstance(args[1].known, str):
            return self.attribute(args[1].known)
        if self.follows(function.known, given):
            star = next((i for i, each in enumerate(node.args) if isinstance(each, ast.Starred)), len(args))
            rest = [*args[star:], *(value for name, value in kwargs.items() if name is None)]
            named = {name: value for name, value in kwargs.items() if name is not None}
            return self.followed(function.known, args[:star], named, rest)
        if owner is None and _is_pure(function.known, node):
            return Value(shares=memory_of(given))
        if owner is not None and node.func.attr in FACTS:
            return Value()
        return self.unknown_call(function, owner, node, given)

    def unknown_call(self, function: Value, owner: Value | None, node: ast.Call, given: list[Value]) -> Value:
        """It may change what it is given and what is kept elsewhere, and put one into another. By torch's names, a
        method that changes its tensor ends in "_"."""
        if self.gets_module(function.known, given):
            self.all_used()
        whole = [*given, function] if owner is None else [*given, owner]
        self.may_change([*(whole if owner is None or node.func.attr.endswith("_") else given), self.kept])
        link(whole)
        return Value(shares=memory_of(whole))

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
        module = self.module._modules[name]
        if isinstance(module, nn.Linear) or is_lora(module) or is_bank(module):
            return Value()
        self.may_change(given)
        link(given)
        return Value(shares=memory_of(given))


def _has_operators(held) -> bool:
    """Whether it is an object whose operators are somebody's code; torch's are known."""
    if isinstance(held, (torch.Tensor, nn.Module)):
        return False
    return any(isinstance(inspect.getattr_static(type(held), name, None), FunctionType) for name in OPERATORS)


def _is_pure(function, node: ast.Call) -> bool:
    """Whether it changes nothing: some of Python's own, and torch's functions but for those that may be told to."""
    if any(each.arg in TELLING for each in node.keywords):
        return False
    if any(function is each for each in PURE):
        return True
    name = getattr(function, "__name__", "_")
    spread = any(isinstance(each, ast.Starred) for each in node.args) or any(each.arg is None for each in node.keywords)
    told = not TELLING.isdisjoint(_positional(function)[: len(node.args)])
    known = any(getattr(each, name, None) is function for each in PURE_MODULES)
    return known and not (name.endswith("_") or spread or told)


def _positional(function) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # built in, where such arguments go by their names
        return []
