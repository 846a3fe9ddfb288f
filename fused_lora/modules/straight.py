"""Forwards that do the same whenever they are called: of which one trace tells all."""

import ast
import inspect
import textwrap
from types import FunctionType, ModuleType

from torch import nn

STATEMENTS = (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr)


def is_straight(module: nn.Module) -> bool:
    """Whether its forward is, by its source, calls of its children and of functions of Python modules, products of
    their results, and names for them: no branch, and nothing that is looked up on the module or called by a method."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__") or "forward" in vars(module):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, TypeError, SyntaxError):
        return False
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list:
        return False
    names = [each.arg for each in (*tree.args.posonlyargs, *tree.args.args)]
    return len(names) > 1 and _Straight(module, forward, tree, *names).holds()


class _Straight:
    def __init__(self, module: nn.Module, forward: FunctionType, tree: ast.FunctionDef, own: str, *names: str):
        self.module, self.tree, self.globals = module, tree, forward.__globals__
        self.own, self.known = own, set(names)

    def holds(self) -> bool:
        return all(self.statement(node) for node in self.tree.body)

    def statement(self, node: ast.stmt) -> bool:
        if isinstance(node, ast.Expr):
            return isinstance(node.value, ast.Constant)  # a docstring
        if not isinstance(node, STATEMENTS) or node.value is None or not self.expression(node.value):
            return False
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(node, ast.Return):
            return True
        self.known |= {target.id for target in targets if isinstance(target, ast.Name)}
        return all(isinstance(target, ast.Name) and target.id != self.own for target in targets)

    def expression(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Constant):
            return True
        if isinstance(node, ast.Name):
            return node.id in self.known
        if isinstance(node, ast.BinOp):
            return isinstance(node.op, ast.Mult) and self.expression(node.left) and self.expression(node.right)
        if not isinstance(node, ast.Call) or not self.callee(node.func):
            return False
        return all(self.expression(each) for each in (*node.args, *(each.value for each in node.keywords)))

    def callee(self, node: ast.expr) -> bool:
        """A child, or what is found in a Python module."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.own:
            return isinstance(self.module._modules.get(node.attr), nn.Module)
        return self.found(node) is not None

    def found(self, node: ast.expr):
        if isinstance(node, ast.Name) and node.id not in self.known:
            return self.globals.get(node.id)
        owner = self.found(node.value) if isinstance(node, ast.Attribute) else None
        return getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None


def facts_of(module: nn.Module) -> dict:
    """Its attributes but for what nn.Module keeps: what its results may depend on, where it has no parameters."""
    return {name: value for name, value in vars(module).items() if name[0] != "_" and name != "training"}
