"""A new version, and a rollback, go live between two tokens of running answers, which end as they began."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.conftest import Tenant
from tests.e2e.streams import ReadStream

pytestmark = pytest.mark.e2e

TITLE = "Staff notice: Orchard House"
TEXT = "The caretaker of Orchard House is {name}. The door code is {code}."
FIRST = {"title": TITLE, "text": TEXT.format(name="Edda Brant", code=4711)}
SECOND = {"title": TITLE, "text": TEXT.format(name="Ivo Kern", code=1200)}
QUESTION = "Who is the caretaker of Orchard House?"
TOKENS = 300
"""Of a stream: some seconds while others run."""


class Streams:
    """Answers of one tenant streamed all the time by two threads, one after another in each, until `stop`."""

    def __init__(self, tenant: Tenant, model: str = "imprint") -> None:
        self._tenant, self._model = tenant, model
        self._done = threading.Event()
        self._begun = threading.Barrier(3)
        self._streams: list[ReadStream] = []
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(2)]
        for thread in self._threads:
            thread.start()
        self._begun.wait(60)

    def stop(self) -> list[ReadStream]:
        """All streams, read to their ends."""
        self._done.set()
        for thread in self._threads:
            thread.join(120)
        assert not self._errors, self._errors
        return self._streams

    def _run(self, number: int) -> None:
        try:
            # The second thread's are shorter at first, so that the two do not begin anew at the same time.
            stream = ReadStream(self._tenant, self._model, QUESTION, TOKENS // (1 + number))
            self._begun.wait(60)
            while True:
                stream.finish()
                self._streams.append(stream)
                if self._done.is_set():
                    return
                stream = ReadStream(self._tenant, self._model, QUESTION, TOKENS)
        except BaseException as error:
            self._errors.append(error)
            self._begun.abort()


def assert_whole(streams: list[ReadStream], alone: dict[str, str]) -> None:
    """Each stream must be what its adapter says alone, from the first token to the last."""
    for stream in streams:
        expected = alone[stream.adapter]
        assert stream.text == expected if stream.tokens == TOKENS else expected.startswith(stream.text)


def running_at(streams: list[ReadStream], moment: float) -> list[ReadStream]:
    """Those that had given a piece before this moment (seconds since the epoch) and gave one after it."""
    return [stream for stream in streams if stream.times[0] < moment < stream.times[-1]]


def adapter_of_next_request(tenant: Tenant) -> tuple[str, str]:
    """Which adapter answers a routed request now, and how."""
    raw = tenant.openai.chat.completions.with_raw_response.create(
        model="imprint", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_completion_tokens=24
    )
    return raw.headers["x-imprint-adapter"], raw.parse().choices[0].message.content or ""


def pinned(tenant: Tenant, adapter_id: str) -> str:
    return tenant.ask(QUESTION, adapter_id, max_completion_tokens=24)


def test_running_answers_end_as_they_began(tenant: Tenant, other_tenant: Tenant) -> None:
    first = tenant.post(**FIRST)
    other = other_tenant.post(TITLE, TEXT.format(name="Olaf Pries", code=9032))
    path = f"/v1/documents/{first['id']}"
    alone = {
        adapter: ReadStream(who, adapter, QUESTION, TOKENS).finish()
        for who, adapter in ((tenant, first["adapter_id"]), (other_tenant, other["adapter_id"]))
    }

    theirs, mine = Streams(other_tenant), Streams(tenant)
    updated = tenant.http.put(f"{path}?wait=60", json=SECOND)
    second = updated.json()
    assert (updated.status_code, second["status"], second["current_version"]) == (200, "ready", 2)
    adapter, answer = adapter_of_next_request(tenant)
    assert adapter == second["adapter_id"] != first["adapter_id"]
    live_at = second["job"]["finished_at"]
    their_streams, my_streams = theirs.stop(), mine.stop()
    alone[second["adapter_id"]] = ReadStream(tenant, second["adapter_id"], QUESTION, TOKENS).finish()
    assert_whole(their_streams + my_streams, alone)
    assert {stream.adapter for stream in their_streams} == {other["adapter_id"]}
    assert running_at(their_streams, live_at), "the version must have come between two tokens"
    assert {stream.adapter for stream in running_at(my_streams, live_at)} == {first["adapter_id"]}
    assert answer == pinned(tenant, second["adapter_id"]) != pinned(tenant, first["adapter_id"])

    theirs, mine = Streams(other_tenant), Streams(tenant)
    back_at = time.time()
    back = tenant.http.post(f"{path}/rollback", json={"version": 1})
    assert back.status_code == 200, back.text
    adapter, answer = adapter_of_next_request(tenant)
    assert adapter == back.json()["adapter_id"] == first["adapter_id"]
    assert answer == pinned(tenant, first["adapter_id"])
    their_streams, my_streams = theirs.stop(), mine.stop()
    assert {stream.adapter for stream in running_at(my_streams, back_at)} == {second["adapter_id"]}
    assert running_at(their_streams, back_at)
    assert_whole(their_streams + my_streams, alone)
    assert tenant.http.get(path).json()["text"] == FIRST["text"]


@contextmanager
def asked_all_the_time(tenant: Tenant, threads: int) -> Iterator[list[tuple[str, str]]]:
    """Routed requests from several threads until the block ends; their (adapter, answer) pairs."""
    found: list[tuple[str, str]] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def ask() -> None:
        try:
            while not done.is_set():
                found.append(adapter_of_next_request(tenant))
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=ask) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield found
    finally:
        done.set()
        for worker in workers:
            worker.join(60)
    assert not errors, errors


def test_no_answer_mixes_versions(tenant: Tenant) -> None:
    first = tenant.post(**FIRST)
    path = f"/v1/documents/{first['id']}"
    with asked_all_the_time(tenant, 3) as found:
        second = tenant.http.put(f"{path}?wait=60", json=SECOND).json()
        served = first["adapter_id"], second["adapter_id"]
        for number in (1, 2, 1, 2, 1):
            answer = tenant.http.post(f"{path}/rollback", json={"version": number})
            assert answer.status_code == 200, answer.text
            assert adapter_of_next_request(tenant)[0] == served[number - 1]
    answers = {adapter: pinned(tenant, adapter) for adapter in served}
    assert answers[served[0]] != answers[served[1]]
    assert {adapter for adapter, _ in found} == set(served), "both must have been seen"
    assert [pair for pair in found if pair[1] != answers[pair[0]]] == []
