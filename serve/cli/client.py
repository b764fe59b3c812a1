"""A small client of Imprint's HTTP API. Failures are ClientError with a message fit for a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import httpx

from serve.cli.output import fail
from serve.tenants import TENANT_HEADER

CONNECT_S = 5.0
READ_S = 300.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ClientError(Exception):
    """The server refused or could not be reached. `status` is the HTTP status, None without an answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """One connection to a server, as the holder of a key."""

    def __init__(self, url: str, key: str, tenant: str = "", transport: httpx.BaseTransport | None = None) -> None:
        """`url` is the server's address with or without `/v1`. Raises ClientError for a key or URL of no use."""
        key = key.strip()
        if not key:
            raise ClientError("no key: put one into IMPRINT_KEY (`imprint key create --tenant NAME` makes one)")
        if not (key.isascii() and key.isprintable()):
            raise ClientError("the key holds characters that no Imprint key has")
        url = url.rstrip("/").removesuffix("/v1")
        try:
            address = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ClientError(f"'{url}' is not a URL: {error}") from error
        if address.scheme not in ("http", "https") or not address.host:
            raise ClientError(f"'{url}' is not a URL such as http://127.0.0.1:8000")
        headers = {"Authorization": f"Bearer {key}"}
        if tenant:
            headers[TENANT_HEADER] = tenant
        self._url = url
        self._http = httpx.Client(
            base_url=url,
            headers=headers,
            timeout=httpx.Timeout(READ_S, connect=CONNECT_S),
            transport=transport,
            # A proxy from the environment cannot reach this machine's loopback.
            trust_env=address.host not in _LOOPBACK,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        """One request, its JSON object back. Raises ClientError. `arguments` are httpx's (json, params, headers)."""
        with self._reachable():
            response = self._http.request(method, path, **arguments)
        if response.is_error:
            raise _refused(response)
        if response.status_code == httpx.codes.NO_CONTENT:
            return {}
        try:
            body = response.json()
        except ValueError as error:
            raise ClientError(f"{self._url}{path} did not answer with JSON; is this an Imprint server?") from error
        return body if isinstance(body, dict) else {"data": body}

    @contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Iterator[tuple[httpx.Headers, Iterator[dict[str, Any]]]]:
        """POST and read server-sent events: the response's headers and the decoded events up to [DONE].

        Raises ClientError, also for an error that the server sends inside the stream.
        """
        with self._reachable(), self._http.stream("POST", path, json=body) as response:
            if response.is_error:
                response.read()
                raise _refused(response)
            yield response.headers, _events(response.iter_lines())

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise ClientError(f"nothing answers at {self._url}; is the server running (`make serve`)?") from error
        except httpx.TimeoutException as error:
            raise ClientError(f"{self._url} did not answer in time") from error
        except httpx.TransportError as error:
            raise ClientError(f"the connection to {self._url} broke: {error}") from error


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError as error:
            raise ClientError("the server sent an event that is not JSON") from error
        if not isinstance(event, dict) or "error" in event:
            raise ClientError(_message(event) or "the server broke off its answer")
        yield event


def _refused(response: httpx.Response) -> ClientError:
    try:
        message = _message(response.json())
    except ValueError:
        message = None
    return ClientError(message or f"the server answered {response.status_code}", response.status_code)


def _message(body: Any) -> str | None:
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else None


@contextmanager
def connected(url: str, key: str, tenant: str) -> Iterator[Client]:
    """A client for one command; what goes wrong on the way to the server and back ends the command with a message."""
    try:
        with Client(url, key, tenant) as client:
            yield client
    except ClientError as error:
        fail(str(error))
