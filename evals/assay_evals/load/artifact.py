"""An artifact directory on its own runtime: a fresh child process (worker.py) serves the requests, and is gone with the test.

Beside what fails at an endpoint there are `refused` (a request that the runtime cannot take) and `crashed` (the process has ended), which
ends a level at once.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from assay.artifact import directory_digest, read_manifest, refuse_code
from assay.child import child_environment, last_lines, module_command, said_of_end
from assay.errors import AssayError, NotSupportedError, UsageError
from assay.host import cores
from assay_evals.load.arrivals import Load
from assay_evals.load.client import CRASHED, TIMEOUT
from assay_evals.load.records import Answer, ArtifactUsed, Failure
from assay_evals.load.wire import Api, Prompt
from assay_evals.runtimes.base import SHARED, check_runtime, runtime_version

_WORKER = "assay_evals.load.worker"
_LOAD_SECONDS = 600.0
# A line holds the times of all tokens of an answer.
_LONGEST_LINE = 1 << 26
_ALONE = "one request at a time"


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """An artifact to load on its runtime.  ignore_eos: answers go on to their full length.  worker: the module that serves."""

    directory: Path
    name: str
    runtime: str
    api: Api
    ignore_eos: bool = False
    worker: str = _WORKER

    @asynccontextmanager
    async def open(self, timeout: float) -> AsyncGenerator[ArtifactClient]:
        """A client of a process that has loaded it; AssayError when it cannot be loaded."""
        digest, template = directory_digest(self.directory), _template(self.directory, self.api)
        with tempfile.TemporaryFile() as output:
            process = await asyncio.create_subprocess_exec(
                *module_command(self.worker),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=output,
                env=child_environment(),
                limit=_LONGEST_LINE,
            )
            client = ArtifactClient(self, process, output, template, timeout)
            try:
                await client.load(digest)
                yield client
            finally:
                await client.close()


class ArtifactClient:
    """Asks one child process; its messages have numbers, by which answers find the question."""

    counts_alone = True

    def __init__(
        self,
        artifact: Artifact,
        process: asyncio.subprocess.Process,
        output: IO[bytes],
        template: Callable[[Prompt], str],
        timeout: float,
    ) -> None:
        self.notes: list[str] = []
        self.software: dict[str, str] = {}
        self.context_length: int | None = None
        self._artifact, self._process, self._output = artifact, process, output
        self._template, self._timeout = template, timeout
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._used: ArtifactUsed | None = None
        self._listening: asyncio.Task[None] | None = None
        self._started = time.perf_counter()

    def now(self) -> float:
        return self._seconds(time.perf_counter())

    def _seconds(self, moment: float) -> float:
        return round(moment - self._started, 6)

    def used(self) -> dict[str, Any]:
        return {
            "artifact": self._used,
            "model": self._artifact.name,
            "api": self._artifact.api,
            "extra": {"ignore_eos": True} if self._artifact.ignore_eos else {},
        }

    async def load(self, digest: str) -> None:
        """Wait until the artifact is loaded; AssayError says why it is not."""
        artifact = self._artifact
        try:
            async with asyncio.timeout(_LOAD_SECONDS):
                self._send(runtime=artifact.runtime, directory=str(artifact.directory.resolve()))
                loaded = await self._read()
        except TimeoutError as error:
            raise AssayError(f"{artifact.directory}: not loaded after {_LOAD_SECONDS:g} s. {self._said()}") from error
        if loaded is None:
            raise AssayError(f"{artifact.directory}: {await self._end()}")
        if "failed" in loaded:
            raise AssayError(loaded["failed"])
        self.context_length = loaded["context_length"]
        self._used = ArtifactUsed(
            directory=str(artifact.directory),
            digest=digest,
            runtime=loaded["runtime"],
            shared=SHARED.get(artifact.runtime, _ALONE),
            cores=cores(),
            load_seconds=round(loaded["load_seconds"], 6),
        )
        self._listening = asyncio.create_task(self._listen())

    async def count(self, prompt: Prompt, output_tokens: int) -> int | None:
        del output_tokens  # Nothing is answered.
        number, answer = self._post(do="count", prompt=self._template(prompt))
        try:
            async with asyncio.timeout(self._timeout):
                return (await answer)["prompt_tokens"]
        except TimeoutError as error:
            raise AssayError(
                f"{self._artifact.directory}: no answer after {self._timeout:g} s. {self._said()}"
            ) from error
        except _CrashError as error:
            raise AssayError(f"{self._artifact.directory}: {error}.") from error
        finally:
            del self._waiting[number]

    async def ask(self, prompt: Prompt, output_tokens: int) -> Answer:
        text, stops = self._template(prompt), not self._artifact.ignore_eos
        sent = self.now()
        number, answer = self._post(do="answer", prompt=text, new_tokens=output_tokens, stops=stops)
        try:
            async with asyncio.timeout(self._timeout):
                return self._answer(sent, await answer)
        except TimeoutError:
            message = " ".join(f"not finished after {self._timeout:g} s. {self._said()}".split())
            return self._failed(sent, TIMEOUT, message.removesuffix("."))
        except _CrashError as error:
            return self._failed(sent, CRASHED, str(error))
        finally:
            del self._waiting[number]
            if not answer.done() or answer.cancelled():
                self._send(do="drop", number=number)

    def _answer(self, sent: float, found: dict[str, Any]) -> Answer:
        if "failed" in found:
            return self._failed(sent, "refused", found["failed"].removesuffix("."))
        chunks = tuple(self._seconds(moment) for moment in found["times"])
        empty = Failure(kind="empty", message="the model ended its text at once")
        return Answer(
            sent=sent,
            chunks=chunks,
            ended=self._seconds(found["ended"]),
            prompt_tokens=found["prompt_tokens"],
            output_tokens=len(chunks),
            finish_reason=found["finish_reason"],
            failure=None if chunks else empty,
        )

    def _failed(self, sent: float, kind: str, message: str) -> Answer:
        return Answer(sent=sent, chunks=(), ended=self.now(), failure=Failure(kind=kind, message=message))

    def _post(self, **message: Any) -> tuple[int, asyncio.Future[dict[str, Any]]]:
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        if self._listening is not None and self._listening.done():
            answer.set_exception(_CrashError("the runtime's process has ended"))
        else:
            self._send(number=number, **message)
        return number, answer

    def _send(self, **message: Any) -> None:
        assert self._process.stdin is not None
        # A process that has ended reads no more; whoever waits is told by its output's end.
        with suppress(BrokenPipeError, ConnectionResetError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _read(self) -> dict[str, Any] | None:
        """The next message of the child; None at its end."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    async def _listen(self) -> None:
        """Hand answers to those who wait for them; at the end tell all of them."""
        while (message := await self._read()) is not None:
            waiting = self._waiting.get(message["number"])
            # Whoever lost patience is gone.
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
        end = _CrashError(" ".join((await self._end()).split()).removesuffix("."))
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(end)

    async def _end(self) -> str:
        """How the process came to its end."""
        returncode = await self._process.wait()
        return f"the runtime's process {said_of_end(returncode, self._printed())}"

    def _said(self) -> str:
        printed = last_lines(self._printed())
        return f"The runtime's process printed: {printed}" if printed else "The runtime's process printed nothing."

    def _printed(self) -> str:
        # The child writes where its own offset is, which a read by this one must not move.
        file = self._output.fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")

    async def close(self) -> None:
        """End the process, whatever it does."""
        if self._listening is not None:
            self._listening.cancel()
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


class _CrashError(Exception):
    """The child process has ended by itself."""


def _template(directory: Path, api: Api) -> Callable[[Prompt], str]:
    """What makes the runtime's text of a prompt: nothing, or the model's own chat template."""
    if api == "completions":
        return str
    # torch stands behind both; they are imported for chats alone.
    from assay.calibration import rendered
    from assay.job import load_tokenizer
    from assay.text import Document

    tokenizer = load_tokenizer(directory)

    def chat(prompt: Prompt) -> str:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return rendered(Document("prompt", messages), tokenizer, answering=True)

    return chat


def read_artifact(
    directory: Path, loads: tuple[Load, ...], *, model: str | None, api: Api, body: str | None, api_key_env: str | None
) -> Artifact:
    """An artifact from the words of the command line; UsageError says what is not for artifacts, or beyond its runtime."""
    if model is not None or api_key_env is not None:
        raise UsageError(
            "--model and --api-key-env are for an --endpoint; an artifact directory has one model and no key."
        )
    refuse_code(directory)
    manifest = read_manifest(directory)
    runtime = str(manifest.get("runtime"))
    check_runtime(runtime, directory)
    beyond = [str(load) for load in loads if load.kind == "rate" or load.value > 1]
    if runtime not in SHARED and beyond:
        raise NotSupportedError(
            f"{directory}: its runtime {runtime} computes one request at a time, so it cannot take {', '.join(beyond)}; "
            "measure --concurrency 1, or serve it with an engine and give its --endpoint."
        )
    runtime_version(runtime)
    return Artifact(
        directory=directory, name=str(manifest.get("name")), runtime=runtime, api=api, ignore_eos=_read_ignore_eos(body)
    )


def _read_ignore_eos(body: str | None) -> bool:
    """The one field that a runtime knows."""
    try:
        value = {} if body is None else json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--body {body}: not JSON ({error}).") from error
    if (
        not isinstance(value, dict)
        or value.keys() - {"ignore_eos"}
        or not isinstance(value.get("ignore_eos", False), bool)
    ):
        raise UsageError(f"""--body {body}: a runtime knows one field: '{{"ignore_eos": true}}'.""")
    return value.get("ignore_eos", False)
