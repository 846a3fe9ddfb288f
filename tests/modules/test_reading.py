"""Which children a forward provably calls with one unmodified value, read off sources that try to be misread."""

import functools
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fused_lora.modules.reading import read


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))
        self.norm = nn.LayerNorm(4)
        self.act = nn.ReLU(inplace=True)
        self.flag, self.kept, self.table = True, None, torch.ones(4)

    def forget(self):
        self.kept.zero_()

    def shaped(self, y):
        return y.view(*y.shape[:-1], 2, 2).transpose(-1, -2)


def helper(module, x):
    return module.k(x), module.v(x)


def changes(*values):
    values[0].zero_()


def starred(module, a, b):
    b.zero_()


def renamed(old, new):
    """As libraries do with arguments that were renamed."""

    def around(function):
        @functools.wraps(function)
        def wrapper(self, *args, **kwargs):
            if old in kwargs:
                kwargs[new] = kwargs.pop(old)
            return function(self, *args, **kwargs)

        return wrapper

    return around


class Plain(Base):
    def forward(self, x, mask=None):
        sizes = (*x.shape[:-1], 2, 2)
        q = self.norm(self.q(x)).view(sizes)
        k, v = self.shaped(self.k(x)), self.v(x).view(sizes).transpose(1, 2)
        if mask is not None:
            q = q + mask
        return self.o(torch.softmax(q + k + v, -1).flatten(-2))


class ByKeyword(Base):
    def forward(self, x):
        return self.q(input=x) + self.k(x)


class Followed(Base):
    def forward(self, x):
        return self.q(x), *helper(self, x)


class Wrapped(Base):
    @renamed("y", "x")
    def forward(self, x):
        return self.q(x) + self.k(x)


class CrossOrNot(Base):
    def forward(self, x, other=None):
        is_cross = other is not None
        read = other if is_cross else x
        q = self.q(x)
        if is_cross and self.flag and self.kept:
            k, v = self.kept
        else:
            k, v = self.k(read), self.v(read)
        return q + k + v


QKV, QK, KV = ("q", "k", "v"), ("q", "k"), ("k", "v")


@pytest.mark.parametrize(("kind", "groups"), [
    (Plain, [QKV]), (ByKeyword, [QK]), (Followed, [QKV]), (Wrapped, [QK]), (CrossOrNot, [QKV, KV]),
])  # fmt: skip
def test_what_is_found(kind, groups):
    assert read(kind()).every == groups


def test_cases_of_none():
    module = CrossOrNot()
    reading, x = read(module), torch.ones(1, 4)
    assert reading.tested == ("other",)
    assert reading.groups(module, (x,), {}) == reading.groups(module, (x, None), {}) == (QKV,)
    assert reading.groups(module, (x, x), {}) == reading.groups(module, (), {"x": x, "other": x}) == (KV,)
    assert reading.among({"q", "v"}).groups(module, (x,), {}) == (("q", "v"),)
    assert reading.among({"q", "v"}).groups(module, (x, x), {}) == ()


def test_cases_of_an_argument_that_only_its_name_gives():
    class Named(Base):
        def forward(self, x, *more, other=None):
            read = x if other is None else other
            return self.q(x) + self.k(read) + self.v(read)

    module, x = Named(), torch.ones(1, 4)
    reading = read(module)
    assert reading.groups(module, (x, x), {}) == (QKV,)
    assert reading.groups(module, (x, None), {"other": x}) == (KV,)


def test_a_wrapper_may_fill_what_seems_to_be_none():
    class Filled(CrossOrNot):
        forward = renamed("old", "other")(CrossOrNot.forward)

    class Renamed(CrossOrNot):
        forward = renamed("old", "new")(CrossOrNot.forward)

    x = torch.ones(1, 4)
    assert read(Filled()).every == [KV]
    assert read(Renamed()).groups(Renamed(), (x,), {"more": x}) == (QKV,)


# Bodies of a forward(self, x, y): nothing in them is a group of q and k.
NOT = """
x += 1
x.mul_(2)
x[0] = 1
x.data.zero_()
x.T[0] = 1
z = x.view(-1); z += 1
z = x[0]; z.zero_()
z = [x]; z[0].zero_()
z = {"x": x}; z["x"].zero_()
F.relu(x, inplace=True)
F.relu(x, True)
torch.add(x, 1, out=x)
torch.relu_(x)
self.act(x)
changes(x)
changes(x.view(-1))
y.update(x)
x = x + 1
x, y = y, x
(x := y)
for z in (1, 2): x = x * z
for z in x: z.zero_()
while y: x.zero_(); break
def f(): x.zero_()
f = lambda: x.zero_()
[z.zero_() for z in x]
try: x.zero_()
except ValueError: pass
with y: x.zero_()
if y: x.zero_()
if y: x = x + 1
x = x if y else x + 1
y and x.zero_()
x.zero_() if y else None
del x[0]
if y: return 1
self.o = self.q
self.o.weight = self.k.weight
y(self.k)
y(self.k.weight)
z = self.k; z.zero_()
self.k(x)
self.q(x)
self.k.forward(x)
z = getattr(y, "k"); y = [self.k]
for z in range(2): self.k(x)
F.relu(x, self.flag)
F.relu(x, *y)
F.relu(x, **y)
F.dropout(x, 0.5, self.training, self.flag)
max([x], key=changes)
if FLAG: x.zero_()
self.k.lora_alpha = 3
self.k.bias += 1
self.eval()
self.apply(changes)
y(self)
getattr(self, "k").eval()
getattr(self, y).eval()
self._modules["k"].eval()
self.__dict__.clear()
[z.eval() for z in self.children()]
changes(self.parameters())
z = self; z.k.lora_alpha = 1
""".strip().splitlines()
# The same where x was put somewhere before q: what may change it there.
KEPT = [
    ("self.kept = x", "self.kept.zero_()"), ("y[0] = x", "y[0].zero_()"), ("y.append(x)", "y.pop().zero_()"),
    ("z = x; y[0] = z", "y[0].zero_()"), ("z = y.copy(); z[0] = x", "z[0].zero_()"),
    ("z = []; z += [x]", "z[0].zero_()"), ("self.norm.kept = x", "self.norm.kept.zero_()"),
    ("changes(y, x)", "y[0].zero_()"), ("GLOBAL[0] = x", "GLOBAL[0].zero_()"), ("GLOBAL[0] = x", "changes()"),
    ("f = lambda: x.zero_(); x = x + 1", "f()"),
]  # fmt: skip
FLAG, GLOBAL = False, [None]


def compiled_from(body, monkeypatch, before="pass"):
    """A module whose forward has the body between q and k, with a source that inspect finds."""
    lines = [f"        {line}" for line in (before, "a = self.q(x)", body, "return a + self.k(x)")]
    if body.startswith("try"):
        lines[2:3] = [f"        {body}", "        except ValueError: pass"]
    source = "\n".join(["class Made(Base):", "    def forward(self, x, y):", *lines])
    scope = {
        "Base": Base,
        "F": F,
        "torch": torch,
        "changes": changes,
        "starred": starred,
        "FLAG": FLAG,
        "GLOBAL": GLOBAL,
    }
    exec(source, scope)
    forward = scope["Made"].forward
    real = inspect.getsource
    monkeypatch.setattr(
        inspect, "getsource", lambda thing: source.partition("\n")[2] if thing is forward else real(thing)
    )
    return scope["Made"]()


@pytest.mark.parametrize(("before", "body"), [
    ("self.kept = x", "self.kept.zero_()"), ("self.kept = [x]", "self.kept[0].zero_()"),
    ("z = {}; z['x'] = x", "z['x'].zero_()"), ("z = []; z.append(x)", "z[0].zero_()"), ("z = x[0]", "z += 1"),
    ("z = (x, y)", "z[0].zero_()"), ("pass", "starred(self, *[y, x])"), ("pass", "starred(self, y, **{'b': x})"),
    ("pass", "starred(self, y, b=x)"), ("self.kept = x", "self.forget()"),
])  # fmt: skip
def test_what_is_kept_elsewhere(before, body, monkeypatch):
    assert read(compiled_from(body, monkeypatch, before)) is None


@pytest.mark.parametrize("body", [line for line in NOT if not line.startswith("except")])
def test_what_is_not_proven(body, monkeypatch):
    reading = read(compiled_from(body, monkeypatch))
    assert reading is None or not any({"q", "k"} <= set(group) for group in reading.every)


@pytest.mark.parametrize(("before", "body"), KEPT)
def test_what_was_put_elsewhere(before, body, monkeypatch):
    assert read(compiled_from("pass", monkeypatch, before)).every == [QK]
    reading = read(compiled_from(body, monkeypatch, before))
    assert reading is None or not any({"q", "k"} <= set(group) for group in reading.every)


@pytest.mark.parametrize("body", [
    "pass", "z = x.shape[0]", "z = a.view(-1); z.mul_(2)", "a += y", "a = self.norm(a)", "z = x.size(-1)", "y = x * 2",
    "assert x.dim() == 2", "if y is None: raise ValueError(x.shape)", "z = torch.cat([x, x])", "self.kept = a",
    "z = len(x)", "if self.flag: a = a * 2", "with torch.no_grad(): a = a * 1", "z = x.to(a.dtype)",
    "a = F.relu(a, True)", "a = self.table * a", "z = getattr(self, 'flag', None)", "a = changes(a, self.kept)",
])  # fmt: skip
def test_what_does_no_harm(body, monkeypatch):
    assert read(compiled_from(body, monkeypatch)).every == [QK]


def test_children_in_branches_of_their_own():
    class Branches(Base):
        def forward(self, x, y):
            if y:
                return self.q(x) + self.k(x)
            return self.v(x)

    assert read(Branches()).every == [QK]

    class Apart(Base):
        def forward(self, x, y):
            a = self.q(x)
            if y:
                a = a + self.k(x)
            return a + self.v(x)

    assert read(Apart()).every == [("q", "v")]


def test_checkpointed_children_are_called_by_others():
    class Checkpointed(Base):
        def forward(self, x):
            return self.q(x) + checkpoint(self.k, x, use_reentrant=False) + self.v(x)

    assert read(Checkpointed()) is None


def test_what_has_no_source():
    namespace = {"Base": Base}
    exec("class Made(Base):\n def forward(self, x): return self.q(x) + self.k(x)", namespace)
    assert read(namespace["Made"]()) is None
    assert read(nn.Linear(2, 2)) is None
    namespace["Made"].forward = functools.partial(print)
    assert read(namespace["Made"]()) is None


class Processor:
    def __call__(self, module, x, other=None):
        if other is None:
            other = x
        return module.q(x) + module.k(other) + module.v(other)


class ByProcessor(Base):
    def __init__(self):
        super().__init__()
        self.processor = Processor()

    def forward(self, x, other=None, **more):
        return self.processor(self, x, other=other, **more)


def test_a_processor_is_followed_and_may_be_replaced():
    module = ByProcessor()
    reading, x = read(module), torch.ones(1, 4)
    assert reading.groups(module, (x,), {}) == (QKV,)
    assert reading.groups(module, (x, x), {}) == (KV,)
    module.processor = lambda *args: x
    assert reading.groups(module, (x,), {}) == ()


def bumping(function):
    @functools.wraps(function)
    def wrapper(self, x):
        x.mul_(2)
        return function(self, x)

    return wrapper


class ByProperty(Base):
    @property
    def bump(self):
        self.kept.mul_(2)

    def forward(self, x):
        self.kept = x
        q = self.q(x)
        self.bump  # noqa: B018
        return q, self.k(x)


class ByDecorator(Base):
    @bumping
    def to_k(self, x):
        return self.k(x)

    def forward(self, x):
        return self.q(x), self.to_k(x)


class ByMaxNorm(Base):
    def forward(self, x, i):
        q = self.q(x)
        return q, F.embedding(i, x, None, 0.1), self.k(x)


class Bumps:
    def __init__(self, module):
        self.module = [module]

    def __getitem__(self, _):
        self.module[0].kept.mul_(2)

    __add__ = __enter__ = __getitem__

    def __exit__(self, *_):
        pass


class ByItem(Base):
    def __init__(self):
        super().__init__()
        self.bumps = Bumps(self)

    def forward(self, x):
        self.kept = x
        q = self.q(x)
        self.bumps[0]
        return q, self.k(x)


class ByOperator(ByItem):
    def forward(self, x):
        self.kept = x
        q = self.q(x)
        self.bumps + 1
        return q, self.k(x)


class ByContext(ByItem):
    def forward(self, x):
        self.kept = x
        q = self.q(x)
        with self.bumps:
            return q, self.k(x)


class HarmlessProperty(Base):
    @property
    def width(self):
        return self.table.shape[0]

    def forward(self, x):
        return self.q(x) * self.width, self.k(x)


@pytest.mark.parametrize("kind", [ByProperty, ByDecorator, ByMaxNorm, ByItem, ByOperator, ByContext])
def test_changes_that_hide(kind):
    reading = read(kind())
    assert reading is None or not reading.every


def test_a_property_that_is_followed():
    assert read(HarmlessProperty()).every == [("q", "k")]
