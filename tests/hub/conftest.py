"""A Hub on this machine and a process with the real client for the tests of sharing."""

import pytest
from client import Client
from loopback import Hub


@pytest.fixture(scope="session")
def _server(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(_server):
    """The loopback Hub, empty at the start of each test. A fault that a test asked for has to have struck."""
    _server.reset()
    yield _server
    idle = [f"{fault.method} {fault.path.pattern}: {fault.what}" for fault in _server.faults if not fault.hits]
    errors = "\n".join(_server.errors)
    _server.reset()
    assert not idle, f"faults that nothing ran into: {idle}"
    assert not errors, f"the loopback Hub itself is at fault:\n{errors}"


@pytest.fixture(scope="session")
def _process(_server, tmp_path_factory):
    with Client(_server, tmp_path_factory.mktemp("client")) as client:
        yield client


@pytest.fixture
def client(hub, _process):
    """The client's process, one for the session, with an empty cache at the start of each test."""
    _process.clear_cache()
    return _process
