"""What holds for all tests."""

import faulthandler

import pytest


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """An interpreter that does not end after its tests says where it waits, and fails, instead of hanging."""
    faulthandler.dump_traceback_later(120, exit=True)
