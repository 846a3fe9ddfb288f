"""Modules that get a forward around their own: their class becomes a subclass of what it was, found again by pickle."""

from torch import nn


class Mixin:
    """What such a subclass adds, with the attributes in `_adds`. Children, parameters, hooks and other attributes of
    the module stay as they are."""

    _adds: tuple[str, ...] = ()

    def __reduce_ex__(self, protocol):
        """As nn.Module, whose class could be found by its name."""
        cls, mixins = type(self), []
        while "_mixin" in vars(cls):
            mixins.insert(0, cls._mixin)
            cls = cls.__bases__[1]
        return _unfilled, (cls, *mixins), self.__dict__.copy()


def mix(module: nn.Module, mixin: type[Mixin]) -> None:
    module.__class__ = _mixed(type(module), mixin)


def unmix(module: nn.Module) -> nn.Module:
    """Makes a module what it was before all mix(), in place, and returns it."""
    while (mixin := vars(type(module)).get("_mixin")) is not None:
        module.__class__ = type(module).__bases__[1]
        for name in mixin._adds:
            vars(module).pop(name, None)
    return module


def _mixed(cls: type[nn.Module], mixin: type[Mixin]) -> type[nn.Module]:
    """The one subclass of cls with the mixin."""
    for known in cls.__subclasses__():
        if vars(known).get("_mixin") is mixin:
            return known
    name = cls.__name__ if "_mixin" in vars(cls) else f"LoRA{cls.__name__}"
    members = {"_mixin": mixin, "__module__": cls.__module__, "__doc__": mixin.__doc__}
    return type(name, (mixin, cls), members)


def _unfilled(cls: type[nn.Module], *mixins: type[Mixin]) -> nn.Module:
    for mixin in mixins:
        cls = _mixed(cls, mixin)
    return cls.__new__(cls)
