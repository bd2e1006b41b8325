"""An S3 store on loopback: moto's, atomic as Amazon's is, and faulty in ways that a test asks for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from loopback import running

ACCESS_DENIED = (403, "AccessDenied")
CLOCK_SKEW = (403, "RequestTimeTooSkewed")
SLOW_DOWN = (503, "SlowDown")


@dataclass
class Store:
    """A running store.

    before: called with method, path and query of each request; a status and an error code that it returns are the answer.
    after: the same, when the request was carried out.
    cut: how many bytes of the next objects arrive before the line breaks, one entry per answer.  conditional: whether
    the conditions of a write are kept to.  crumb: how many bytes of an object arrive with each answer, which ends well.
    """

    url: str
    before: Callable[[str, str, str], tuple[int, str] | None] | None = None
    after: Callable[[str, str, str], tuple[int, str] | None] | None = None
    cut: list[int] = field(default_factory=list)
    conditional: bool = True
    crumb: int | None = None
    requests: list[tuple[str, str]] = field(default_factory=list)

    def client(self) -> Any:
        """A client of the store's own, beside the one that is tested."""
        import boto3

        return boto3.client("s3", endpoint_url=self.url)

    def environment(self) -> dict[str, str]:
        """What leads boto3 here, and nowhere else."""
        return {
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "2",
        }


@contextmanager
def running_store() -> Iterator[Store]:
    """An empty store on a free port, stopped at the end."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    lock = threading.RLock()
    reset_moto()
    moto = DomainDispatcherApplication(create_backend_app)
    store = Store("")

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path, query = environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"]
        store.requests.append((method, path))
        if store.before and (refused := store.before(method, path, query)):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return _refuse(refused, start_response)
        if not store.conditional and method != "GET":
            environ.pop("HTTP_IF_MATCH", None)
            environ.pop("HTTP_IF_NONE_MATCH", None)
        held: list[Any] = []
        with lock:
            body = b"".join(moto(environ, lambda *arguments: held.append(arguments)))
        if store.after and (refused := store.after(method, path, query)):
            return _refuse(refused, start_response)
        if store.crumb and method == "GET" and "/blobs/" in path:
            (status, headers, *_), body = held[-1], body[: store.crumb]
            held.append((status, [pair for pair in headers if pair[0].lower() != "content-length"]))
        start_response(*held[-1])
        if store.cut and method == "GET" and "/blobs/" in path:
            return _broken(body[: store.cut.pop(0)])
        return [body]

    server = make_server("127.0.0.1", 0, answer, threaded=True)
    store.url = f"http://127.0.0.1:{server.server_port}"
    with running(server):
        yield store


def reset_moto() -> None:
    """Forget all buckets: they are kept by the process, not by a server."""
    from moto.backends import get_backend
    from moto.core.model_instances import reset_model_data

    for account in get_backend("s3").values():
        for backend in account.values():
            backend.reset()
    reset_model_data()


def _refuse(answer: tuple[int, str], start_response: Any) -> Iterable[bytes]:
    status, code = answer
    start_response(f"{status} No", [("Content-Type", "application/xml")])
    return [f"<Error><Code>{code}</Code><Message>as asked</Message></Error>".encode()]


def _broken(data: bytes) -> Iterator[bytes]:
    """A body that ends before its Content-Length."""
    yield data
