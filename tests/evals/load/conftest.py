"""An endpoint that answers as a test wants, and load tests of it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from load_levels import SETTINGS
from stream_server import Endpoint, running_endpoint

from assay.progress import Progress
from assay_evals.load.records import Measured
from assay_evals.load.session import measure, read_settings


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with running_endpoint() as running:
        yield running


@pytest.fixture
def load_test(endpoint: Endpoint) -> Callable[..., Measured]:
    """Measure the endpoint; keywords replace settings."""

    def run(**changes: Any) -> Measured:
        return measure(read_settings(**(SETTINGS | {"endpoint": endpoint.url} | changes)), Progress())

    return run


@pytest.fixture
def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
