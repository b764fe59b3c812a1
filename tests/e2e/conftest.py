"""Tenants for tests on the shared server."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from tests.server import Server

_numbers = itertools.count()


@dataclass
class Tenant:
    """A tenant of its own for one test."""

    name: str
    key: str
    http: httpx.Client
    openai: openai.OpenAI

    def post(self, title: str, text: str, states: tuple[str, ...] = ("ready",), **fields: Any) -> dict[str, Any]:
        """Post a document and wait until it is in one of the states."""
        response = self.http.post("/v1/documents?wait=60", json={"title": title, "text": text, **fields})
        assert response.status_code == 200, response.text
        document: dict[str, Any] = response.json()
        assert document["status"] in states, document
        return document

    def ask(self, question: str, model: str = "imprint", **options: Any) -> str:
        """The answer's text, greedily decoded."""
        completion = self.openai.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_completion_tokens=options.pop("max_completion_tokens", 32),
            **options,
        )
        return completion.choices[0].message.content or ""


def make_tenant(server: Server, name: str = "") -> Tenant:
    """A tenant with a key; a new one unless it is named."""
    name = name or f"tenant-{next(_numbers)}"
    key = server.create_key(name)
    return Tenant(name, key, server.http(key), server.openai(key))


@contextmanager
def _new_tenant(server: Server) -> Iterator[Tenant]:
    made = make_tenant(server)
    yield made
    made.http.close()
    made.openai.close()


@pytest.fixture
def tenant(server: Server) -> Iterator[Tenant]:
    with _new_tenant(server) as made:
        yield made


@pytest.fixture
def other_tenant(server: Server) -> Iterator[Tenant]:
    with _new_tenant(server) as made:
        yield made
