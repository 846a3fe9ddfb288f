"""Which module of the CUDA extension serves the torch that runs, and what is said where none does."""

import types
import warnings

import pytest
import torch

from fused_lora import backends, extension

OWN, STABLE = "_C_torch2_13", "_C_stable"


@pytest.fixture
def installed(monkeypatch):
    """Pretends a torch and modules of the extension: those that load, and those that do not, with their errors."""

    def install(*names, torch_version="2.13.0+cu130", cuda="13.0", broken=()):
        monkeypatch.setattr(torch, "__version__", torch_version)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        found = {f"fused_lora.{name}" for name in (*names, *broken)}
        monkeypatch.setattr(extension.importlib.util, "find_spec", lambda name: name if name in found else None)

        def load(name, package):
            if name[1:] in broken:
                raise ImportError(f"undefined symbol in {name[1:]}")
            module = types.SimpleNamespace(__name__=name[1:])
            if name != f".{STABLE}":
                module.lora_linear = None
            return module

        monkeypatch.setattr(extension.importlib, "import_module", load)

    return install


def test_the_module_for_this_torch_is_taken(installed):
    installed(OWN, STABLE)
    found = extension.load()
    assert (found.module.__name__, found.words, found.has_autograd) == (OWN, "with autograd in C++", True)


def test_the_stable_one_where_it_is_asked_for(installed):
    installed(OWN, STABLE)
    found = extension.load(stable=True)
    assert (found.module.__name__, found.has_autograd) == (STABLE, False)


def test_a_torch_that_nobody_knew_gets_the_stable_one_and_is_told(installed):
    installed(OWN, STABLE, torch_version="2.99.1+cu140")
    found = extension.load()
    assert found.module.__name__ == STABLE
    assert found.words == (
        "by torch's stable ABI: eager calls take the host longer than with a build for torch 2.99.1+cu140"
    )


def test_a_module_that_does_not_load_is_replaced_and_named(installed):
    """As one built for a nightly of the same number."""
    installed(STABLE, broken=[OWN])
    found = extension.load()
    assert found.module.__name__ == STABLE
    assert found.words.startswith(f"by torch's stable ABI ({OWN}: undefined symbol in {OWN}): eager calls")


@pytest.mark.parametrize(("versions", "words"), [
    (("2.13.0+cpu", None), "torch 2.13.0+cpu is no CUDA build, to which the CUDA extension is of no use"),
    (("2.9.1+cu128", "12.8"), "the CUDA extension is for torch 2.10 and later, this is 2.9.1+cu128"),
])  # fmt: skip
def test_torches_that_it_is_not_for_are_told_so_in_one_line(versions, words, installed):
    installed(OWN, STABLE, torch_version=versions[0], cuda=versions[1], broken=[OWN, STABLE])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert extension.load() == (None, words)


def test_one_that_was_not_built(installed):
    installed()
    assert extension.load() == (None, "the CUDA extension is not built (make build)")


def test_one_of_which_nothing_loads_warns(installed):
    installed(broken=[OWN, STABLE])
    with pytest.warns(UserWarning, match=r"does not load, install or build it again: _C_torch2_13: .*; layers run"):
        found = extension.load()
    assert found.module is None
    assert "undefined symbol in _C_stable" in found.words


def test_backends_ask_once(installed, monkeypatch):
    installed(broken=[OWN])
    for function in (backends.extension, backends.eager_extension):
        function.cache_clear()
    with pytest.warns(UserWarning, match="does not load"):
        assert "does not load" in backends.extension_obstacle()
    assert "does not load" in backends.extension_obstacle(), "and warns no more"
    assert backends.eager_extension() is None
    for function in (backends.extension, backends.eager_extension):
        function.cache_clear()


@pytest.mark.parametrize(("version", "name"), [
    ("2.13.0+cu130", "_C_torch2_13"), ("2.10.1", "_C_torch2_10"), ("3.0.0", "_C_torch3_0"),
    ("2.14.0.dev20260101+cu130", "_C_torch2_14_0_dev20260101_cu130"), ("2.10.0a0+b4e4ee8", "_C_torch2_10_0a0_b4e4ee8"),
])  # fmt: skip
def test_what_is_no_release_has_a_module_of_its_own(version, name):
    assert extension.module_name(version) == name


@pytest.mark.parametrize("value", ["", "full", "0"])
def test_a_wrong_abi_is_refused(value, monkeypatch):
    monkeypatch.setenv("FUSED_LORA_ABI", value)
    backends.extension.cache_clear()
    with pytest.raises(ValueError, match=f"FUSED_LORA_ABI must be auto or stable, got '{value}'"):
        backends.extension()
    backends.extension.cache_clear()
