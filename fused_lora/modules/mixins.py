"""Modules that get a forward around their own: their class becomes a subclass of what it was, found again by pickle."""

import functools
from types import FunctionType

from torch import nn


class Mixin:
    """What such a subclass adds, with the attributes in `_adds`. Children, parameters, hooks and other attributes of
    the module stay as they are, and so do its class's name and its forward's signature, by which libraries go."""

    _adds: tuple[str, ...] = ()
    _plain: type[nn.Module]  # the class without any mixin
    _known: FunctionType  # its forward when it got them

    def is_as_known(self) -> bool:
        """Whether its class has the forward that was read: libraries put others in the place of a class's own."""
        cls = type(self)
        return cls._plain.forward is cls._known

    def __reduce_ex__(self, protocol):
        """As without the subclass, which cannot be found by its name."""
        cls, mixins = type(self), []
        while "_mixin" in vars(cls):
            mixins.insert(0, cls._mixin)
            cls = cls.__bases__[1]
        reduced = super().__reduce_ex__(max(protocol, 2))
        if type(self).__reduce__ is not object.__reduce__:
            return reduced  # of a class that rebuilds its modules in a way of its own
        return _unfilled, (cls, *mixins), *reduced[2:]


def mix(module: nn.Module, mixin: type[Mixin]) -> None:
    module.__class__ = _mixed(type(module), mixin)


def unmix(module: nn.Module) -> nn.Module:
    """Makes a module what it was before all mix(), in place, and returns it."""
    while (mixin := vars(type(module)).get("_mixin")) is not None:
        forward = type(module).forward
        module.__class__ = type(module).__bases__[1]
        for name in mixin._adds:
            vars(module).pop(name, None)
        _rebind(module, forward)
    return module


def _rebind(module: nn.Module, forward: FunctionType) -> None:
    """Its class's forward in the place of one that it has no more: who hooks into modules keeps what he found there."""
    for name, value in vars(module).items():
        if getattr(value, "__func__", None) is forward and value.__self__ is module:
            vars(module)[name] = type(module).forward.__get__(module)


def _mixed(cls: type[nn.Module], mixin: type[Mixin]) -> type[nn.Module]:
    """The one subclass of cls, with the forward that it has now, with the mixin."""
    plain = getattr(cls, "_plain", cls)
    for subclass in cls.__subclasses__():
        if vars(subclass).get("_mixin") is mixin and subclass._known is plain.forward:
            return subclass
    members = {"_mixin": mixin, "_plain": plain, "_known": plain.forward, "forward": _as_if(mixin.forward, cls.forward)}
    members |= {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (mixin, cls), members)


def _as_if(forward: FunctionType, own) -> FunctionType:
    """A forward with the name and the signature of another, which is found by its __wrapped__."""
    twin = FunctionType(forward.__code__, forward.__globals__, closure=forward.__closure__)
    return functools.wraps(own)(twin)


def _unfilled(cls: type[nn.Module], *mixins: type[Mixin]) -> nn.Module:
    for mixin in mixins:
        cls = _mixed(cls, mixin)
    return cls.__new__(cls)
