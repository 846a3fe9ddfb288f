"""Expressions of a forward that is followed: what they give, what they may change, and which children they call."""

import ast
import builtins
import inspect
import math
from types import FunctionType, MethodType, ModuleType

import torch
from torch import nn

from .values import FACT, UNKNOWN, Called, Value, is_given, memory_of

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


class Expressions:
    """The part of following.Follower that evaluates; scopes are names of a function and what they stand for."""

    module: nn.Module
    children: dict[int, str]
    globals: dict
    path: tuple
    kept: frozenset[Value]

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
        return Value(known=self.globals.get(node.id, getattr(builtins, node.id, UNKNOWN)))

    def of_Attribute(self, node, scope):
        owner = self.value(node.value, scope)
        if owner.known is self.module:
            return self.attribute(node.attr)
        if isinstance(owner.known, ModuleType):
            return Value(known=getattr(owner.known, node.attr, UNKNOWN))
        self.used(owner)  # another's weight, or forward
        return Value(known=FACT) if node.attr in FACTS else Value(shares=owner.memory)

    def attribute(self, name: str) -> Value:
        """Of the module: a child, or a function that can be followed."""
        held = vars(self.module).get(name, self.module._modules.get(name))
        if isinstance(held, nn.Module) and id(held) in self.children:
            return Value(known=held)
        if held is None:
            function = inspect.getattr_static(type(self.module), name, None)
            if isinstance(function, FunctionType):
                return Value(known=MethodType(function, self.module))
        elif isinstance(getattr(type(held), "__call__", None), FunctionType):  # noqa: B004  its code, not whether it has any
            self.relies_on[name] = type(held)
            return Value(known=MethodType(type(held).__call__, held))
        return Value(shares=self.kept)

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
        if self.follows(function.known, given):
            first_star = next((i for i, each in enumerate(node.args) if isinstance(each, ast.Starred)), len(args))
            rest = [*args[first_star:], *(value for name, value in kwargs.items() if name is None)]
            named = {name: value for name, value in kwargs.items() if name is not None}
            return self.followed(function.known, args[:first_star], named, rest)
        if owner is None:
            if not _is_pure(function.known, given, kwargs):
                self.may_change([*given, function])
            return Value(shares=memory_of([*given, function]))
        if node.func.attr in FACTS:
            return Value(known=FACT)
        # By torch's names, a method that changes its tensor ends in "_". Of what it is given nothing is known.
        self.may_change([*given, owner] if node.func.attr.endswith("_") else given)
        owner.shares |= memory_of(given)  # as a list's append
        return Value(shares=memory_of([*given, owner]))

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
        return Value(shares=memory_of(given))


def _is_pure(function, given: list[Value], kwargs: dict) -> bool:
    """Whether it changes nothing: some of Python's own, and torch's functions but for those that are told to."""
    name = getattr(function, "__name__", "_")
    told = "out" in kwargs or "inplace" in kwargs or any(value.known is True for value in given)
    if any(function is each for each in PURE):
        return True
    return not name.endswith("_") and not told and any(getattr(each, name, None) is function for each in PURE_MODULES)
