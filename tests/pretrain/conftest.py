"""One text for all tests."""

import pytest

from .problem import make_data


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))
