"""One thread: so small a model gains nothing from more, and loses much when other tests want the same cores."""

from tests.examples.conftest import _one_thread  # noqa: F401
