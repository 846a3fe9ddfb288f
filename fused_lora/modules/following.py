"""Follows the source of a module's forward: the calls of its children, and what may change memory between them.

Instead of values it has what is known of them: which are None, which are the module, its children and functions that
get the module, and which memory a value may share. What cannot be followed counts as if it changed whatever it gets.
"""

import ast
import inspect
import textwrap
from types import FunctionType, MethodType

from torch import nn

from .expressions import Expressions
from .values import Called, Value, link, memory_of, merged

MOST_DEPTH = 4  # of functions that call each other with the module


class Follower(Expressions):
    """Follows functions that get the module; `events` are calls of its children, sets of memory that may change, and
    None where all may."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.children = {id(child): name for name, child in module.named_children()}
        self.events: list[Called | frozenset | None] = []
        self.relies_on: dict[str, type] = {}
        self.kept = Value()  # whatever is found elsewhere: on modules, in globals, in the closures of functions
        self.captured: set[str] = set()  # names that functions inside a followed one read, at any time
        self.path: tuple = ()
        self.depth = 0
        self.branches = 0
        self.tested: set[Value] = set()  # values that were compared with None, of which that was not known

    # Functions

    def call(self, function: FunctionType, args: list[Value], kwargs: dict[str, Value], rest=()) -> Value:
        """The function's result, its body followed. rest is of starred arguments: any that are not bound may be it."""
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        if not isinstance(tree, ast.FunctionDef):
            raise TypeError("no function")
        parameters = [each.arg for each in (*tree.args.posonlyargs, *tree.args.args)]
        names = [*parameters, *(each.arg for each in tree.args.kwonlyargs)]
        bound = dict(zip(parameters, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        given = memory_of([*args, *kwargs.values(), *rest])
        scope = {name: bound.get(name) or Value(shares=memory_of(rest)) for name in names}
        scope |= {star.arg: Value(shares=given) for star in (tree.args.vararg, tree.args.kwarg) if star is not None}
        outer, self.function = getattr(self, "function", None), function
        path, self.depth = self.path, self.depth + 1
        self.block(tree.body, scope)
        self.function, self.path, self.depth = outer, path, self.depth - 1
        return Value(shares=given)

    def may_change(self, values: list[Value]) -> None:
        memory = memory_of(values)
        if memory:
            self.events.append(memory)

    def used(self, value: Value) -> None:
        """A child in a place where nothing is known of what becomes of it."""
        name = self.children.get(id(value.known))
        if name is not None:
            self.events.append(Called(name, None, self.path))

    def all_used(self) -> None:
        """The module in a place where nothing is known of what becomes of it and of its children."""
        self.events.append(None)

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
            if target.id in self.captured:
                link([self.kept, value])
        elif isinstance(target, (ast.Tuple, ast.List, ast.Starred)):
            for each in target.elts if not isinstance(target, ast.Starred) else [target.value]:
                self.bind(each, Value(shares=value.memory), scope)
        else:  # an attribute or an entry: whose owner changes, and may be a view of another
            owner = self.value(target.value, scope)
            self.used(owner)
            self.may_change([owner])
            link([self.kept if owner.is_known else owner, value])

    def on_AugAssign(self, node, scope):
        value = self.value(node.value, scope)
        owner = self.value(node.target if isinstance(node.target, ast.Name) else node.target.value, scope)
        self.used(owner)
        self.may_change([owner])
        link([owner, value])  # of a list

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
        scope.update(merged(reached))
        return True

    def on_With(self, node, scope):
        for item in node.items:
            value = self.value(item.context_expr, scope)
            if item.optional_vars is not None:
                self.bind(item.optional_vars, Value(shares=value.memory), scope)
        return self.branch(lambda: self.block(node.body, scope))

    def opaque(self, node: ast.AST, scope: dict[str, Value]) -> None:
        """Loops, functions and whatever else is not followed may change all that they name, and name anything anew."""
        self.capture(node, scope)
        self.uses_in(node, scope)
        for each in ast.walk(node):
            if isinstance(each, ast.Name):
                value = scope.get(each.id)
                if value is not None and isinstance(each.ctx, ast.Load):
                    self.may_change([value])
                if not isinstance(each.ctx, ast.Load):
                    scope[each.id] = Value(shares=memory_of([self.kept, *scope.values()]))
            if isinstance(each, ast.FunctionDef):
                scope[each.name] = Value(shares=memory_of([self.kept, *scope.values()]))

    def capture(self, node: ast.AST, scope: dict[str, Value]) -> None:
        """What functions inside read they may read, and change, whenever anything unknown is called."""
        functions = [each for each in ast.walk(node) if isinstance(each, (ast.FunctionDef, ast.Lambda))]
        self.captured |= {name.id for each in functions for name in ast.walk(each) if isinstance(name, ast.Name)}
        link([self.kept, *(value for name, value in scope.items() if name in self.captured)])

    def uses_in(self, node: ast.AST, scope: dict[str, Value]) -> None:
        """The children that are named, or all, unless no more is done with the module than to read plain attributes."""
        names = [each for each in ast.walk(node) if self.is_module(each, scope)]
        read = [each for each in ast.walk(node) if self.is_module(getattr(each, "value", None), scope)]
        plain = vars(self.module).keys() - {"_modules"} | self.module._modules.keys()
        if len(names) > len(read) or any(getattr(each, "attr", None) not in plain for each in read):
            self.all_used()
        for each in ast.walk(node):
            if isinstance(each, ast.Attribute) and each.attr in self.module._modules:
                self.events.append(Called(each.attr, None, self.path))

    def is_module(self, node, scope: dict[str, Value]) -> bool:
        return isinstance(node, ast.Name) and node.id in scope and scope[node.id].known is self.module

    def branch(self, follow):
        outer, self.path = self.path, (*self.path, self.new_branch())
        result = follow()
        self.path = outer
        return result

    def new_branch(self) -> int:
        self.branches += 1
        return self.branches

    def follows(self, function, given: list[Value]) -> bool:
        """Whether it is Python's and gets the module."""
        if not isinstance(function, (MethodType, FunctionType)) or not self.gets_module(function, given):
            return False
        wrapped = hasattr(function, "__wrapped__")  # what a decorator does besides is not in its function's source
        return self.depth < MOST_DEPTH and not wrapped and _has_source(function)

    def gets_module(self, function, given: list[Value]) -> bool:
        of_module = isinstance(function, MethodType) and function.__self__ is self.module
        return of_module or any(value.known is self.module for value in given)

    def followed(self, function, args: list[Value], kwargs: dict[str, Value], rest: list[Value]) -> Value:
        if isinstance(function, MethodType):
            args = [Value(known=function.__self__), *args]
        return self.call(getattr(function, "__func__", function), args, kwargs, rest)


def _only_raises(block: list[ast.stmt]) -> bool:
    return bool(block) and isinstance(block[-1], ast.Raise)


def _has_source(function) -> bool:
    try:
        return bool(inspect.getsource(function))
    except (OSError, TypeError):
        return False
