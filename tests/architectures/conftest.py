"""--at-least N: so many architectures must have been checked, or what does not build small any more would go unseen."""

import pytest

from fused_lora.modules import protocol


@pytest.fixture(autouse=True)
def _together(monkeypatch):
    """Layers are computed together wherever they may be, as where kernels are for it."""
    monkeypatch.setattr(protocol, "obstacle", lambda *args: None)


def pytest_addoption(parser):
    parser.addoption("--at-least", type=int, default=0, help="fail where fewer tests than this passed")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):  # a worker of xdist
        return
    passed, least = len(reporter.stats.get("passed", ())), session.config.getoption("at_least", default=0)
    if passed < least and session.exitstatus == 0:
        reporter.write_line(f"{passed} architectures were checked, --at-least {least} are wanted", red=True)
        session.exitstatus = 1
