"""Random sequences of post, update, rollback, delete, chat, eviction and crash, against a model of what each tenant
must see.

Hypothesis draws the sequences until the time is up (IMPRINT_MODEL_S seconds); IMPRINT_SEED sets where from, and each
run prints it. The first failure ends the run, for it cannot be repeated: what the server did before stays done. With
IMPRINT_SHRINK=1 Hypothesis tries shorter forms of it nevertheless. The server has fewer slots and less room for
adapters than there are adapters, so they come and go all the time. What is acknowledged must survive kill -9.
"""

from __future__ import annotations

import functools
import json
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from hypernet.training.corpus.documents import ask, sample_document
from tests.e2e.conftest import Tenant, make_tenant
from tests.e2e.streams import ReadStream
from tests.processes import kill, tree
from tests.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.own_server]

FEW = {"ENGINE__MAX_LORAS": "2", "ENGINE__MAX_CPU_LORAS": "3"}
SHORT, LONG = 10, 300  # tokens of an answer, and of one that is read while other things happen
BASE = "base"
SHRINK = bool(os.environ.get("IMPRINT_SHRINK"))


def _sampled(number: int) -> tuple[str, str]:
    rng = Random(f"tenants-{number}")
    document = sample_document(rng, 1 + number % 3)
    return document.text, ask(document.facts[0], document, rng).text


TEXTS, QUESTIONS = zip(*(_sampled(number) for number in range(10)), strict=True)

WEIGHTS = {"post": 6, "roll_back": 5, "delete": 2, "wait_until_ready": 2, "chat_routed": 5, "chat_pinned": 6,
           "chat_base": 1, "begin_long_answer": 2, "trespass": 2, "evict": 2, "crash": 1}


@dataclass(frozen=True)
class Step:
    """One thing that is done, and what with; each uses what it needs of this. `place` is of a text or question."""

    what: str
    tenant: int
    name: str
    place: int
    number: int
    wait: bool
    stream: bool

    def __str__(self) -> str:
        flags = f"{' wait' * self.wait}{' stream' * self.stream}"
        return f"{self.what} tenant {self.tenant}, {self.name}, place {self.place}, number {self.number}{flags}"


STEPS = st.builds(
    Step,
    # In one strategy, so that each sequence can hold all of them: Hypothesis would leave out most of several rules.
    what=st.sampled_from([what for what, weight in WEIGHTS.items() for _ in range(weight)]),
    tenant=st.integers(0, 1),
    name=st.sampled_from(["first", "second/part"]),
    place=st.integers(0, len(TEXTS) - 1),
    number=st.integers(1, 4),
    wait=st.booleans(),
    stream=st.booleans(),
)


@dataclass
class Version:
    """A version as the client posted it; its adapters once the test has seen them."""

    text: str
    adapter_ids: list[str] = field(default_factory=list)


@dataclass
class KnownDocument:
    """What a client knows of its document: `wanted` is the number that must be served in the end, `may_serve` those
    that may be served until then."""

    id: str
    versions: list[Version]
    wanted: int
    may_serve: set[int]

    @property
    def settled(self) -> bool:
        return self.may_serve == {self.wanted} and bool(self.adapter_ids)

    @property
    def text(self) -> str:
        return self.versions[self.wanted - 1].text

    @property
    def adapter_ids(self) -> list[str]:
        return self.versions[self.wanted - 1].adapter_ids


@dataclass
class Side:
    """One tenant: its client, what it must see, and what is gone for it."""

    client: Tenant
    documents: dict[str, KnownDocument] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    """IDs of deleted documents and their adapters."""
    adapters: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Document and version of every adapter seen."""
    answers: dict[tuple[str, str], str] = field(default_factory=dict)
    """The greedy answer of an adapter (or the base) to a question, as first given."""


@dataclass
class Answer:
    """What came back for a chat request."""

    status: int
    body: dict[str, Any]
    text: str = ""
    adapter: str = ""
    document: str | None = None
    reason: str = ""


@dataclass
class Drive:
    """What all sequences of a run share."""

    server: Server
    until: float
    crashes_left: int
    engine_kills_left: int
    evictor: Tenant
    evicting: list[str]
    trace: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    failure: str | None = None

    @property
    def over(self) -> bool:
        """Whether nothing is to be done any more."""
        return self.failure is not None or time.monotonic() > self.until


def guarded(step: Callable[..., None]) -> Callable[..., None]:
    """Leave a step out when the run is over; keep its failure for the end, where it is not to be tried again."""

    @functools.wraps(step)
    def run(self: TenantsMachine, **drawn: Any) -> None:
        if self.drive.over:
            return
        try:
            step(self, **drawn)
            self.lists_are_complete()
        except Exception:
            if SHRINK:
                raise
            self.drive.failure = traceback.format_exc()

    return run


class TenantsMachine(RuleBasedStateMachine):
    """Drives one server through all sequences, each with tenants of its own."""

    drive: ClassVar[Drive]

    def __init__(self) -> None:
        super().__init__()
        self.sides: list[Side] = []
        self.running: list[tuple[Side, str, ReadStream]] = []
        self.steps_left = 0

    @initialize()
    @guarded
    def tenants_arrive(self) -> None:
        self.drive.trace.clear()
        self._note("two tenants arrive, with a document each")
        self.sides = [Side(make_tenant(self.server)) for _ in range(2)]
        for number, side in enumerate(self.sides):
            self._post(side, "first", TEXTS[number], wait=False, by_id=False)

    @property
    def server(self) -> Server:
        return self.drive.server

    @rule(step=STEPS)
    @guarded
    def take(self, step: Step) -> None:
        self._note(str(step))
        self.drive.counts[step.what] += 1
        getattr(self, step.what)(self.sides[step.tenant], step)
        self.steps_left -= 1
        if self.steps_left <= 0:
            self._end_long_answers()

    # What clients do

    def post(self, side: Side, step: Step) -> None:
        self._post(side, step.name, TEXTS[step.place], step.wait, by_id=step.stream)
        if step.wait:
            self.chat_routed(side, step)

    def roll_back(self, side: Side, step: Step) -> None:
        """To one of the document's versions, rarely to one that it does not have; at times just after a new one was
        posted, of which something is being made then."""
        document = side.documents.get(step.name)
        if document is not None and step.stream:
            self._post(side, step.name, TEXTS[step.place], wait=False, by_id=step.wait)
            time.sleep(0.05 * step.place)
        last = len(document.versions) if document else 0
        number = last + 1 if step.number > 3 or not last else 1 + step.place % last
        response = side.client.http.post(f"/v1/documents/{step.name}/rollback", json={"version": number})
        if document is None or number > last:
            assert_error(response, 404, "document_not_found" if document is None else "version_not_found")
            return
        body = response.json()
        known = document.versions[number - 1].adapter_ids
        assert response.status_code in ((200,) if known else (200, 202)), response.text
        assert (body["id"], body["version"]) == (document.id, number)
        document.wanted = number
        if response.status_code == 200:
            assert body["current_version"] == number and (not known or body["adapter_ids"] == known), body
            document.may_serve = {number}
            self._learn(side, document, body)
            self.chat_routed(side, step)  # the very next request sees it
        else:
            assert body["status"] == "processing" and body["job"]["version"] == number, body
            document.may_serve.add(number)

    def delete(self, side: Side, step: Step) -> None:
        document = side.documents.pop(step.name, None)
        response = side.client.http.delete(f"/v1/documents/{step.name}")
        if document is None:
            assert_error(response, 404, "document_not_found")
            return
        assert response.status_code == 200, response.text
        adapters = [adapter for adapter, (owner, _) in side.adapters.items() if owner == document.id]
        side.gone += [document.id, *adapters]
        for path in (f"documents/{document.id}", f"documents/{step.name}", *(f"adapters/{one}" for one in adapters)):
            assert side.client.http.get(f"/v1/{path}").status_code == 404, path
        for model in (document.id, *adapters[:2]):
            assert self._chat(side, model, QUESTIONS[0], False).status == 404, model

    def wait_until_ready(self, side: Side, step: Step) -> None:
        if document := side.documents.get(step.name):
            self._settle(side, document)

    def chat_routed(self, side: Side, step: Step) -> None:
        place = self._place(side, step)
        answer = self._chat(side, "imprint", QUESTIONS[place], step.stream)
        assert answer.status == 200, answer
        live = {document.id: document for document in side.documents.values()}
        # What is thought of shows also where no document is close enough to the question.
        routed = side.client.http.post("/v1/route", json={"prompt": QUESTIONS[place]}).json()
        for candidate in routed["candidates"]:
            self._belongs(side, live[candidate["document_id"]], candidate["adapter_id"])
        considered = {candidate["document_id"] for candidate in routed["candidates"]}
        assert considered >= {document.id for document in live.values() if document.settled}, (routed, live)
        if any(document.settled for document in live.values()):
            assert answer.reason != "no_candidates", answer
        if not live:
            assert answer.reason == "no_candidates", answer
        if answer.adapter == BASE:
            assert answer.reason in ("below_threshold", "no_candidates", "ambiguous", "degraded"), answer
        else:
            assert answer.reason == "matched" and answer.document in live, (answer, live)
            self._belongs(side, live[answer.document], answer.adapter)
        self._same_answer(side, answer.adapter, place, answer.text)

    def chat_pinned(self, side: Side, step: Step) -> None:
        place = self._place(side, step)
        document = side.documents.get(step.name)
        if document is None:
            for model in side.gone[-2:]:
                assert self._chat(side, model, QUESTIONS[place], step.stream).status == 404, model
            return
        mine = [adapter for adapter, (owner, _) in side.adapters.items() if owner == document.id]
        model = mine[step.place % len(mine)] if step.number == 1 and mine else document.id
        answer = self._chat(side, model, QUESTIONS[place], step.stream)
        if answer.status == 409 and not any(version.adapter_ids for version in document.versions):
            assert answer.body["error"]["code"] == "model_not_ready", answer
            return
        assert answer.status == 200, answer
        if model == document.id:
            assert answer.document == document.id
            self._belongs(side, document, answer.adapter)
        else:
            assert answer.adapter == model, "a pinned adapter answers, current or not"
        self._same_answer(side, answer.adapter, place, answer.text)

    def chat_base(self, side: Side, step: Step) -> None:
        answer = self._chat(side, BASE, QUESTIONS[step.place], step.stream)
        assert (answer.status, answer.adapter) == (200, BASE), answer
        self._same_answer(side, BASE, step.place, answer.text)

    def begin_long_answer(self, side: Side, step: Step) -> None:
        """It is read while other things happen, and must end as it began."""
        document = side.documents.get(step.name)
        if document is None or not document.settled or self.running:
            return
        adapter, question = document.adapter_ids[0], QUESTIONS[step.place]
        self._same_answer(side, adapter, step.place, None)
        self.running.append((side, question, ReadStream(side.client, adapter, question, LONG)))
        self.steps_left = 3

    def trespass(self, side: Side, step: Step) -> None:
        """Nothing of a tenant's is there for another one."""
        other = self.sides[1 - step.tenant]
        stranger = other.client.http
        document = side.documents.get(step.name)
        if document is None:
            return
        adapters = [adapter for adapter, (of, _) in side.adapters.items() if of == document.id]
        for model in (document.id, *adapters[-2:]):
            assert self._chat(other, model, QUESTIONS[0], False).status == 404, model
        path = f"/v1/documents/{document.id}"
        for one in (path, f"{path}/versions", *(f"/v1/adapters/{adapter}" for adapter in adapters)):
            assert stranger.get(one).status_code == 404, one
        assert stranger.post(f"{path}/rollback", json={"version": step.number}).status_code == 404
        assert stranger.put(path, json={"text": "Mine."}).status_code == 404
        assert stranger.delete(path).status_code == 404

    # What happens to the server

    def evict(self, side: Side, step: Step) -> None:
        """Ask for more other adapters than the engine has room for."""
        for document in self.drive.evicting:
            self.drive.evictor.ask("Who?", document, max_completion_tokens=1)

    def crash(self, side: Side, step: Step) -> None:
        """kill -9 of everything just after a post was acknowledged, or of vLLM's processes; nothing where this run has
        had its share of both."""
        if step.stream and self.drive.engine_kills_left > 0:
            self._kill_engine()
        elif self.drive.crashes_left > 0:
            self._crash(side, step.name, TEXTS[step.place])

    # What must hold after every step

    def lists_are_complete(self) -> None:
        """Each tenant's list holds its documents and no others, in the versions that it asked for."""
        for side in self.sides:
            page = side.client.http.get("/v1/documents").json()
            assert not page["has_more"]
            listed = {(one["id"], one["external_id"], one["version"], one["latest_version"]) for one in page["data"]}
            known = {(one.id, name, one.wanted, len(one.versions)) for name, one in side.documents.items()}
            assert listed == known
            for one in page["data"]:
                document = side.documents[one["external_id"]]
                allowed = ("ready", "degraded") if document.settled else ("processing", "ready", "degraded")
                assert one["status"] in allowed, one
                assert one["current_version"] in {*document.may_serve, *(() if document.settled else (None,))}, one

    def teardown(self) -> None:
        if self.sides and not self.drive.over:
            self.everything_is_as_it_must_be()
        for side in self.sides:
            side.client.http.close()
            side.client.openai.close()

    @guarded
    def everything_is_as_it_must_be(self) -> None:
        if self.drive.crashes_left > 0 and any(side.documents for side in self.sides):
            self._note("crash at the end")
            self._crash(self.sides[0], "first", TEXTS[0])
        self._note("check everything")
        self._end_long_answers()
        self._all_is_there()
        for side in self.sides:
            while side.documents:
                _, document = side.documents.popitem()
                assert side.client.http.delete(f"/v1/documents/{document.id}").status_code == 200

    # Steps

    def _post(self, side: Side, name: str, text: str, wait: bool, by_id: bool) -> None:
        document = side.documents.get(name)
        query = {"wait": 60} if wait else {}
        if document is not None and by_id:
            response = side.client.http.put(f"/v1/documents/{document.id}", json={"text": text}, params=query)
        else:
            response = side.client.http.post("/v1/documents", json={"text": text, "external_id": name}, params=query)
        assert response.status_code in ((200,) if wait else (200, 202)), response.text
        body = response.json()
        if document is None:
            assert body["created"] and body["id"] not in side.gone and body["version"] == 1, body
            document = side.documents[name] = KnownDocument(body["id"], [Version(text)], 1, {1})
        elif text == document.text:
            assert not body["created"] and body["version"] == document.wanted, body
        else:
            assert body["created"], body
            document.versions.append(Version(text))
            document.wanted = len(document.versions)
            document.may_serve.add(document.wanted)
        assert (body["id"], body["version"]) == (document.id, document.wanted), body
        assert body["latest_version"] == len(document.versions), body
        if wait:
            self._settle(side, document)

    def _place(self, side: Side, step: Step) -> int:
        """Whose question to ask: often that of the named document's text, so that it is routed to."""
        document = side.documents.get(step.name)
        return step.place if document is None or step.number > 2 else TEXTS.index(document.text)

    def _settle(self, side: Side, document: KnownDocument) -> None:
        body = side.client.http.get(f"/v1/documents/{document.id}", params={"wait": 60}).json()
        assert body["status"] in ("ready", "degraded") and body["text"] == document.text, body
        assert (body["version"], body["current_version"]) == (document.wanted, document.wanted), body
        document.may_serve = {document.wanted}
        self._learn(side, document, body)

    def _learn(self, side: Side, document: KnownDocument, body: dict[str, Any]) -> None:
        """Take in a settled document's adapters: those that this version had before, else ones never seen anywhere."""
        version = document.versions[document.wanted - 1]
        assert body["adapter_ids"], body
        if version.adapter_ids:
            assert body["adapter_ids"] == version.adapter_ids, body
            return
        for adapter_id in body["adapter_ids"]:
            assert self._look_up(side, adapter_id) == (document.id, document.wanted)
            assert all(adapter_id not in other.adapters for other in self.sides if other is not side)
        version.adapter_ids = body["adapter_ids"]

    def _look_up(self, side: Side, adapter_id: str) -> tuple[str, int]:
        """Of which document and version an adapter is. It must be this tenant's and none that was deleted."""
        assert adapter_id not in side.gone
        if adapter_id not in side.adapters:
            response = side.client.http.get(f"/v1/adapters/{adapter_id}")
            assert response.status_code == 200, response.text
            side.adapters[adapter_id] = (response.json()["document_id"], response.json()["version"])
        return side.adapters[adapter_id]

    def _belongs(self, side: Side, document: KnownDocument, adapter_id: str) -> None:
        """Check that this adapter may answer for the document now."""
        of, number = self._look_up(side, adapter_id)
        assert of == document.id and number in document.may_serve, (adapter_id, of, number, document)
        if document.settled:
            assert adapter_id in document.adapter_ids, (adapter_id, document)

    def _same_answer(self, side: Side, adapter: str, place: int, text: str | None) -> None:
        """An adapter's greedy answer is always the same; the first one recorded is asked for by its ID, alone."""
        key = (adapter, QUESTIONS[place])
        if key not in side.answers:
            answer = self._chat(side, adapter, QUESTIONS[place], False)
            assert (answer.status, answer.adapter) == (200, adapter), answer
            side.answers[key] = answer.text
        assert text is None or text == side.answers[key], (adapter, text, side.answers[key])

    def _end_long_answers(self) -> None:
        while self.running:
            side, question, stream = self.running.pop()
            text = stream.finish()
            assert text.startswith(side.answers[stream.adapter, question]), (stream.adapter, text)

    def _abandon_long_answers(self) -> None:
        """They may break off now; what they gave must still be the right beginning."""
        while self.running:
            side, question, stream = self.running.pop()
            short = side.answers[stream.adapter, question]
            assert stream.text.startswith(short) or short.startswith(stream.text), (stream.adapter, stream.text)

    def _crash(self, side: Side, name: str, text: str) -> None:
        self.drive.crashes_left -= 1
        self._abandon_long_answers()
        self._post(side, name, text, wait=False, by_id=False)
        self.server.kill()
        self.server.start(**FEW)
        self._all_is_there()

    def _kill_engine(self) -> None:
        self.drive.engine_kills_left -= 1
        self._abandon_long_answers()
        victims = [one for one in tree(self.server.pid) if "EngineCore" in " ".join(_command(one))]
        assert victims, "no engine process was found"
        kill(victims)
        deadline = time.monotonic() + 240
        while (answer := self._chat(self.sides[0], BASE, QUESTIONS[0], False)).status != 200:
            assert answer.status in (500, 502, 503) and time.monotonic() < deadline, answer
            time.sleep(0.5)
        self._all_is_there()

    def _all_is_there(self) -> None:
        """Every document gets ready, and adapters answer as ever."""
        self.lists_are_complete()
        for side in self.sides:
            for document in side.documents.values():
                self._settle(side, document)
            known = [(adapter, place) for adapter, question in side.answers if adapter not in side.gone
                     for place in range(len(QUESTIONS)) if QUESTIONS[place] == question]
            for adapter, place in known[-3:]:
                answer = self._chat(side, adapter, QUESTIONS[place], False)
                assert answer.status == 200, answer
                self._same_answer(side, adapter, place, answer.text)

    def _chat(self, side: Side, model: str, question: str, stream: bool) -> Answer:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_completion_tokens": SHORT,
        }
        if stream:
            return _streamed(side.client.http, body)
        response = side.client.http.post("/v1/chat/completions", json=body)
        found = response.json()
        text = found["choices"][0]["message"]["content"] or "" if response.status_code == 200 else ""
        return _answer(response, found, text)

    def _note(self, step: str) -> None:
        self.drive.trace.append(step)


def _streamed(client: httpx.Client, body: dict[str, Any]) -> Answer:
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        raw = response.read().decode()
    if response.status_code != 200:
        return _answer(response, json.loads(raw), "")
    lines = [line.removeprefix("data: ") for line in raw.split("\n\n") if line]
    assert lines[-1] == "[DONE]", raw
    events = [json.loads(line) for line in lines[:-1]]
    text = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    return _answer(response, events[0], text)


def _answer(response: httpx.Response, body: dict[str, Any], text: str) -> Answer:
    headers = response.headers
    return Answer(
        response.status_code,
        body,
        text,
        headers.get("x-imprint-adapter", ""),
        headers.get("x-imprint-document"),
        headers.get("x-imprint-reason", ""),
    )


def assert_error(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status and response.json()["error"]["code"] == code, response.text


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def drive(server: Server, seconds: float, steps: int, crashes: int, engine_kills: int) -> None:
    """Run sequences of about `steps` steps on this server for so long, with so many crashes among them at most."""
    number = int(os.environ.get("IMPRINT_SEED", "4"))
    seconds = float(os.environ.get("IMPRINT_MODEL_S", seconds))
    server.start(**FEW)
    evictor = make_tenant(server, "evictor")
    evicting = [
        evictor.post(f"House {one}", f"House {one} has {one + 3} rooms.", ("ready", "degraded"))["id"]
        for one in range(4)
    ]
    run = Drive(server, time.monotonic() + seconds, crashes, engine_kills, evictor, evicting)

    @seed(number)
    class Machine(TenantsMachine):
        drive = run

    options = settings(
        max_examples=max(10, int(seconds)),  # more than there is time for; those that are left do nothing
        stateful_step_count=steps,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink] if SHRINK else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(Machine, settings=options)
    finally:
        print(f"\nIMPRINT_SEED={number} {dict(run.counts)}")
    if run.failure is not None:
        sequence = "\n".join(run.trace)
        pytest.fail(f"IMPRINT_SEED={number}\n{sequence}\n{run.failure}", pytrace=False)
    assert run.crashes_left < crashes, "no sequence had a crash in it"


@pytest.mark.timeout(1200)
def test_each_tenant_sees_what_it_must(own_server: Server) -> None:
    drive(own_server, seconds=150, steps=20, crashes=1, engine_kills=0)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_each_tenant_sees_what_it_must_for_long(own_server: Server) -> None:
    drive(own_server, seconds=1800, steps=40, crashes=6, engine_kills=3)
