"""Debian's docker-registry on loopback, for tests and benchmarks: the real server, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAM = shutil.which("docker-registry")
# Where its files are kept in tests: it syncs each of them, which takes no time in memory.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
MISSING = "docker-registry is not installed (Debian: docker-registry)"
_CONFIG = """version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage:
  filesystem: {{rootdirectory: {root}}}
  delete: {{enabled: true}}
http: {{addr: "127.0.0.1:{port}"}}
{auth}"""


@dataclass(frozen=True)
class OciServer:
    """A running server.  host: HOST:PORT.  root: where it keeps its blobs."""

    host: str
    root: Path

    def blob(self, digest: str) -> Path:
        """Where the server keeps a blob's bytes."""
        algorithm, _, hexadecimal = digest.partition(":")
        return self.root / "docker/registry/v2/blobs" / algorithm / hexadecimal[:2] / hexadecimal / "data"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def running_oci_server(directory: Path, auth: str = "") -> Iterator[OciServer]:
    """Run a server that keeps everything in `directory`; auth: a part of its configuration."""
    assert PROGRAM, MISSING
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    config = directory / "config.yml"
    config.write_text(_CONFIG.format(root=directory / "data", port=port, auth=auth))
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([PROGRAM, "serve", str(config)], stdout=log, stderr=log)
    try:
        _wait_for(port, process, directory / "log")
        yield OciServer(f"127.0.0.1:{port}", directory / "data")
    finally:
        process.terminate()
        process.wait(10)


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"docker-registry did not start: {log.read_text()}")
