"""The command line in processes that start at once: forked from a server that has the heavy libraries imported already."""

from __future__ import annotations

import multiprocessing
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from tempfile import TemporaryDirectory

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "assay.cli",
        "assay.pipeline",
        "assay.plan",
        "plotly.graph_objects",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
    ]
)


class Command(AbstractContextManager["Command"]):
    """One `assay …` in a process of its own, as `subprocess.Popen` would run it; leaving the context ends it."""

    def __init__(self, *arguments: object, cwd: Path | None = None) -> None:
        self.arguments = ["assay", *map(str, arguments)]
        self._output = TemporaryDirectory(prefix="assay-output-")
        self._process = _SERVER.Process(
            target=_run, args=(self.arguments, cwd or Path.cwd(), dict(os.environ), Path(self._output.name))
        )
        self._process.start()

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._output.cleanup()

    @property
    def runs(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        self._process.kill()
        self._process.join()

    def communicate(self, timeout: float) -> CompletedProcess[str]:
        """What the command said, after its end. Raises `subprocess.TimeoutExpired` while it runs on."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise TimeoutExpired(self.arguments, timeout)
        output = Path(self._output.name)
        return CompletedProcess(
            self.arguments, code, *((output / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        )


def _run(arguments: list[str], cwd: Path, environment: dict[str, str], output: Path) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = arguments
    from assay.cli import main

    main()
