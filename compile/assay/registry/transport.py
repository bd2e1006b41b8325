"""Requests to one server: authorised, redirected with care, and repeated where that can help.

Sources: RFC 9110; distribution-spec 1.1; Docker's token authentication (Bearer challenges, also with refresh tokens).
Repeated are failures to connect, broken connections, 408, 429 and 5xx, after growing random waits or what Retry-After
says; never another 4xx.  A token is sent to the server that it is for, and to no host that this one redirects to.
"""

from __future__ import annotations

import contextlib
import functools
import random
import re
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlencode, urljoin, urlsplit

import httpx2

from assay import __version__
from assay.errors import AccessDeniedError, AssayError, IntegrityError, UnreachableError
from assay.registry.credentials import Credentials, config_path
from assay.registry.oci import MAX_JSON_BYTES, parse_json

ATTEMPTS: Final = 6
BASE_SECONDS = 0.5
LONGEST_SECONDS: Final = 10.0
LONGEST_RETRY_AFTER_SECONDS: Final = 60.0
CONNECT_SECONDS: Final = 10.0
# Without a byte for so long, a connection counts as broken.
STALL_SECONDS = 60.0
# After the last byte of an upload a server may hash or move it before it answers.
ANSWER_SECONDS: Final = 600.0
_REPEATED = frozenset({408, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 5
_LOOPBACK = re.compile(r"localhost|127(\.\d{1,3}){3}|::1")
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
Body = Callable[[], Iterator[bytes]]


@dataclass(frozen=True)
class Answer:
    """A response whose body was read."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def reason(self) -> str:
        """What the server says went wrong, in at most 200 characters."""
        with contextlib.suppress(IntegrityError, KeyError, IndexError, TypeError):
            error = parse_json(self.body, "")["errors"][0]
            text = f"{error['code']}: {error.get('message', '')}"
            return "".join(character for character in text if character.isprintable())[:200]
        return ""

    def has_error(self, code: str) -> bool:
        """Whether the server gave this code of the distribution-spec."""
        return self.reason().startswith(code + ":")


class AttemptError(Exception):
    """What failed and may go well when it is tried again.  retry_after: what the server said of when."""

    def __init__(self, failure: str, retry_after: str | None = None) -> None:
        super().__init__(failure)
        self.retry_after = retry_after


class Patience:
    """How often to try again, and how long to wait before."""

    def __init__(self) -> None:
        self._failures = 0

    def progress(self) -> None:
        """Something worth keeping was achieved: what failed before no longer counts."""
        self._failures = 0

    def wait(self, failure: str, retry_after: str | None = None) -> None:
        """Wait before the next attempt; UnreachableError when there have been enough."""
        self._failures += 1
        if self._failures >= ATTEMPTS:
            raise UnreachableError(f"{failure} (tried {self._failures} times). The same command may work later.")
        seconds = min(LONGEST_SECONDS, BASE_SECONDS * 2 ** (self._failures - 1)) * random.uniform(0.5, 1)
        if retry_after and retry_after.strip().isdigit():
            seconds = max(seconds, min(float(retry_after), LONGEST_RETRY_AFTER_SECONDS))
        time.sleep(seconds)


@dataclass
class _Login:
    """What is sent along with requests, and the secrets that messages must not show."""

    basic: str | None = None
    tokens: dict[str, str] = field(default_factory=dict[str, str])
    secrets: set[str] = field(default_factory=set[str])


class Transport:
    """Requests to the server at `origin` ("https://host:port"); safe to be used by several threads.

    credentials: asked for once, when the server first wants to know who we are.  name: the registry in messages.
    """

    def __init__(self, origin: str, name: str, credentials: Callable[[], Credentials | None]) -> None:
        self.origin = origin
        self.name = name
        self._find_credentials = functools.cache(credentials)
        self._login = _Login()
        self._lock = threading.Lock()
        self._timeout = httpx2.Timeout(STALL_SECONDS, connect=CONNECT_SECONDS, pool=None)
        self._upload_timeout = httpx2.Timeout(
            STALL_SECONDS, connect=CONNECT_SECONDS, read=max(STALL_SECONDS, ANSWER_SECONDS), pool=None
        )
        headers = {"User-Agent": f"assay/{__version__}", "Accept-Encoding": "identity"}
        self._client = httpx2.Client(timeout=self._timeout, headers=headers)
        weakref.finalize(self, self._client.close)

    def send(
        self,
        method: str,
        url: str,
        scope: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        """Ask until there is an answer that will not change by asking again, and read it (at most MAX_JSON_BYTES)."""
        patience = Patience()
        while True:
            try:
                with self.open(method, url, scope, headers=headers, body=body) as response:
                    answer = self.read(response)
            except httpx2.TransportError as error:
                patience.wait(self.describe(error))
                continue
            if answer.status not in _REPEATED:
                return answer
            patience.wait(f"{self.failure(method, url, answer)}", answer.headers.get("retry-after"))

    @contextlib.contextmanager
    def open(
        self,
        method: str,
        url: str,
        scope: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | Body | None = None,
    ) -> Generator[httpx2.Response]:
        """One request, authorised; the response is read by the caller.  Raises httpx2.TransportError.

        scope: what a token is asked for, as "repository:NAME:pull".  body: bytes, or what makes an iterator of them.
        """
        response = self._exchange(method, self.absolute(url), scope, dict(headers or {}), body)
        try:
            yield response
        finally:
            response.close()

    def failure(self, method: str, url: str, answer: Answer) -> str:
        """What an answer means, in words."""
        place = urlsplit(url).path
        reason = answer.reason()
        return self._clean(f"{self.name}: {method} {place} was answered with {answer.status}. {reason}".rstrip())

    def describe(self, error: Exception) -> str:
        """What a broken connection means, in words."""
        text = self._clean(str(error))[:200]
        return f"{self.name}: {type(error).__name__}{': ' if text else ''}{text}"

    def absolute(self, url: str) -> str:
        """The address that a path or an address leads to; AssayError when that is in the clear, and ours was not."""
        url = urljoin(self.origin, url)
        parts, ours = urlsplit(url), urlsplit(self.origin)
        in_the_clear = ours.scheme == "http" and (is_loopback(parts.hostname) or not is_loopback(ours.hostname))
        if not parts.hostname or parts.scheme not in (("https", "http") if in_the_clear else ("https",)):
            raise AssayError(
                f"{self.name}: it sends us on to {parts.scheme}://{parts.hostname or ''}; only https is followed."
            )
        return url

    def read(self, response: httpx2.Response) -> Answer:
        """The answer in an open response; IntegrityError when it is longer than MAX_JSON_BYTES."""
        data = bytearray()
        for chunk in response.iter_raw():
            data += chunk
            if len(data) > MAX_JSON_BYTES:
                raise IntegrityError(
                    f"{self.name}: an answer of more than {MAX_JSON_BYTES} bytes; at most that many are read."
                )
        return Answer(response.status_code, response.headers, bytes(data))

    def _exchange(
        self, method: str, url: str, scope: str, headers: dict[str, str], body: bytes | Body | None
    ) -> httpx2.Response:
        asked = redirects = 0
        while True:
            ours = _origin(url) == _origin(self.origin)
            sent = self._authorization(scope) if ours else None
            request = self._client.build_request(
                method,
                url,
                headers=headers | ({"Authorization": sent} if sent else {}),
                content=body if body is None or isinstance(body, bytes) else body(),
                timeout=self._timeout if body is None or isinstance(body, bytes) else self._upload_timeout,
            )
            response = self._client.send(request, stream=True)
            status = response.status_code
            if status in _REDIRECTS and method in ("GET", "HEAD") and redirects < _MAX_REDIRECTS:
                response.close()
                redirects += 1
                url = self.absolute(urljoin(url, response.headers.get("location", "")))
            elif status == 401 and ours and asked < 2:
                # Twice: what we had may have expired, and what we get by then may be for another scope.
                asked += 1
                response.close()
                self._authorise(scope, response.headers.get_list("www-authenticate"), sent)
            elif status in (401, 403) and ours:
                with contextlib.closing(response):
                    raise self._denied(scope, self.read(response))
            else:
                return response

    # Authorisation

    def _authorization(self, scope: str) -> str | None:
        token = self._login.tokens.get(scope)
        return f"Bearer {token}" if token else self._login.basic

    def _authorise(self, scope: str, challenges: list[str], sent: str | None) -> None:
        """Answer a challenge: find credentials or a new token.  `sent`: what was refused."""
        with self._lock:
            if self._authorization(scope) != sent:
                return  # another thread was faster
            kinds = {challenge.partition(" ")[0].lower(): challenge for challenge in challenges}
            credentials = self._find_credentials()
            if credentials:
                self._login.secrets |= {credentials.password, credentials.refresh_token, credentials.basic[6:]}
            if "bearer" in kinds:
                self._login.tokens[scope] = self._fetch_token(scope, kinds["bearer"], credentials)
                self._login.secrets.add(self._login.tokens[scope])
            elif "basic" in kinds and credentials and credentials.user:
                self._login.basic = credentials.basic
            # Otherwise the next request is refused again, and that is reported.

    def _fetch_token(self, scope: str, challenge: str, credentials: Credentials | None) -> str:
        facts = dict(_CHALLENGE.findall(challenge))
        realm = self.absolute(facts.get("realm", ""))
        # Servers ask for what this one request needs; asking for all that is to come saves a token.
        asked = facts.get("scope", "")
        ours = not asked or asked.rpartition(":")[0] == scope.rpartition(":")[0]
        query = {"scope": scope if ours else asked} | {key: facts[key] for key in ("service",) if key in facts}
        patience = Patience()
        while True:
            try:
                if credentials and credentials.refresh_token:
                    form = query | {"grant_type": "refresh_token", "refresh_token": credentials.refresh_token}
                    response = self._client.post(realm, data=form | {"client_id": "assay"})
                else:
                    headers = {"Authorization": credentials.basic} if credentials else {}
                    response = self._client.get(
                        f"{realm}{'&' if '?' in realm else '?'}{urlencode(query)}", headers=headers
                    )
            except httpx2.TransportError as error:
                patience.wait(self.describe(error))
                continue
            answer = Answer(response.status_code, response.headers, response.content)
            if answer.status not in _REPEATED:
                break
            patience.wait(self.failure("GET", realm, answer), answer.headers.get("retry-after"))
        if answer.status != 200:
            raise self._denied(scope, answer)
        value = parse_json(answer.body, f"{self.name}: the answer of {urlsplit(realm).hostname}")
        token = value.get("token") or value.get("access_token")
        if not isinstance(token, str) or not token.isprintable():
            raise AssayError(f"{self.name}: {urlsplit(realm).hostname} answered without a token.")
        return token

    def _denied(self, scope: str, answer: Answer) -> AccessDeniedError:
        credentials = self._find_credentials()
        who = "the credentials" if credentials else "there are no credentials"
        what = "were not accepted, or do not allow this" if credentials else "for it"
        return AccessDeniedError(
            self._clean(
                f"{self.name}: access denied ({answer.status}) for {scope}: {who} in {config_path()} {what}. "
                f"Log in with an account that may (docker login HOST). {answer.reason()}".rstrip()
            )
        )

    def _clean(self, text: str) -> str:
        for secret in self._login.secrets:
            if secret:
                text = text.replace(secret, "***")
        return text


def repeatable(status: int) -> bool:
    """Whether asking again may help."""
    return status in _REPEATED


def is_loopback(host: str | None) -> bool:
    """Whether a host is this machine."""
    return host is not None and _LOOPBACK.fullmatch(host) is not None


def _origin(url: str) -> tuple[Any, ...]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
