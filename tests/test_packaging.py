"""What pip sees: one version, one licence, nothing pinned that torch decides."""

import re
from importlib import metadata
from pathlib import Path

import pytest

import fused_lora

ROOT = Path(__file__).parent.parent


@pytest.fixture
def project():
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_one_version(project):
    """Written once: in the project's table, or in the package and read from there."""
    if "version" in project["project"].get("dynamic", []):
        assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fused_lora.__version__"}
        assert "version" not in project["project"]
    else:
        assert project["project"]["version"] == fused_lora.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z]+\d+)?", fused_lora.__version__)
    try:
        installed = metadata.version("fused_lora")
    except metadata.PackageNotFoundError:
        pytest.skip("fused_lora runs from its sources here")
    assert installed == fused_lora.__version__


def test_the_version_can_be_read_without_importing_torch():
    """setuptools takes a literal from the source; for anything else it would import the package to build it."""
    assert re.search(r'^__version__ = "[^"]+"$', (PACKAGE / "__init__.py").read_text(), re.MULTILINE)


PACKAGE = Path(fused_lora.__file__).parent


def test_the_licence_is_apache(project):
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert project["project"]["license"] == "Apache-2.0"
    assert project["project"]["license-files"] == ["LICENSE"]


def test_torch_is_the_only_requirement(project):
    """No Triton: the CUDA builds of torch bring the one they need."""
    assert [re.match(r"\w+", each).group() for each in project["project"]["dependencies"]] == ["torch"]
    assert "==" not in " ".join(project["project"]["dependencies"])


def test_type_checkers_read_its_annotations(project):
    """PEP 561: the marker, and that it is packed."""
    assert (PACKAGE / "py.typed").read_bytes() == b""
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["fused_lora"]


def test_every_folder_of_the_package_is_packed():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)
