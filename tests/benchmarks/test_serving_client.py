"""The arithmetic of the load client, and that it reads streams as servers send them."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from benchmarks.serving.client import (
    CUT,
    OK,
    ChatRequest,
    Load,
    Sample,
    closed_loop,
    completions,
    itl_s,
    percentiles_ms,
    rate,
    recovery,
    session,
    stream,
    summary,
)

REQUEST = ChatRequest("m", "hello", 4)


def sample(ended: float, outcome: str = OK, arrivals: tuple[tuple[float, int], ...] = ()) -> Sample:
    return Sample(10.0, ended, list(arrivals), outcome)


def test_each_token_of_a_joined_arrival_counts_with_its_share_of_the_gap() -> None:
    one = sample(11.0, arrivals=((10.2, 1), (10.3, 2), (10.9, 5)))
    assert one.ttft_s == pytest.approx(0.2)
    assert itl_s(one) == pytest.approx([0.1, 0.2, 0.2, 0.2])
    assert itl_s(sample(11.0)) == []


def test_percentiles_are_milliseconds_and_none_without_values() -> None:
    assert percentiles_ms([0.001, 0.002, 0.003], (50, 100)) == {"p50": 2.0, "p100": 3.0}
    assert percentiles_ms([], (50,)) == {"p50": None}


def test_a_summary_counts_what_ended_well_within_the_time() -> None:
    good = ((10.5, 1), (11.0, 4))
    load = Load([sample(12.0, OK, good), sample(13.0, OK, good), sample(15.5, OK, good), sample(11.0, CUT),
                 sample(10.1, "status 503: slots_busy")], 10.0, 15.0)
    found = summary(load)
    assert (found["requests"], found["requests_per_s"], found["tokens_per_s"]) == (2, 0.4, 1.6)
    assert found["errors"] == {"status 503: slots_busy": 1, CUT: 1}
    assert found["ttft_ms"]["p50"] == pytest.approx(500)
    assert completions(load) == pytest.approx([2.0, 3.0, 5.5])


def test_recovery_is_measured_from_the_fault_to_the_first_good_window_after_the_fall() -> None:
    # 10 a second, none for 7 s after second 20, then 10 again until 60.
    times = [i / 10 for i in range(600) if not 200 <= i < 270]
    found = recovery(times, fault=20.0, end=60.0, before=10.0, share=0.8, window_s=5.0)
    assert found.after_s == pytest.approx(6.0)  # 4 of the window's 5 s
    assert found.lowest == 0.0
    assert recovery(times, fault=30.0, end=60.0, before=10.0).after_s == 0.0
    assert recovery([at for at in times if at < 20], fault=20.0, end=60.0, before=10.0).after_s is None
    with pytest.raises(ValueError, match="less than a window"):
        recovery(times, fault=58.0, end=60.0, before=10.0)


def test_rate_counts_a_half_open_interval() -> None:
    assert rate([0.0, 1.0, 2.0], 0.0, 2.0) == 1.0


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def tokens(number: int) -> bytes:
    return event(choices=[{"delta": {"content": "x"}}], usage={"completion_tokens": number})


STREAMS = {
    "whole": ([tokens(0), tokens(1) + tokens(3), tokens(4)[:20], tokens(4)[20:], b"data: [DONE]\n\n"], OK),
    "short": ([tokens(1), b"data: [DONE]\n\n"], "1 tokens in place of 4"),
    "error": ([tokens(1), event(error={"code": "engine_dead"}), b"data: [DONE]\n\n"], CUT),
    "cut": ([tokens(1)], CUT),
}


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """A fake server of canned streams, by the model's name; it closes the connection after each."""
    seen = itertools.count()

    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert body["ignore_eos"] and body["stream_options"]["continuous_usage_stats"]
        model = body["model"]
        if model == "refused" or (model == "sometimes" and next(seen) % 2):
            return web.json_response({"error": {"code": "slots_busy"}}, status=503)
        response = web.StreamResponse(headers={"Connection": "close"})
        await response.prepare(request)
        for piece in STREAMS["whole" if model == "sometimes" else model][0]:
            await response.write(piece)
        return response

    application = web.Application()
    application.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.mark.parametrize("name", STREAMS)
async def test_streams_end_with_their_outcome(url: str, name: str) -> None:
    async with session("key") as http:
        found = await stream(http, url, ChatRequest(name, "hello", 4))
    assert found.outcome == STREAMS[name][1]
    assert found.tokens == (4 if name == "whole" else 1)
    assert found.ended >= found.arrivals[-1][0] >= found.started


async def test_errors_are_told_apart(url: str) -> None:
    async with session() as http:
        assert (await stream(http, url, ChatRequest("refused", "hello", 4))).outcome == "status 503: slots_busy"
        assert (await stream(http, "http://127.0.0.1:9", REQUEST)).outcome == "ClientConnectorError"


async def test_a_closed_loop_sends_as_many_as_it_may_and_goes_on_after_errors(url: str) -> None:
    requests = itertools.repeat(ChatRequest("sometimes", "hello", 4))
    load = await closed_loop(url, "key", requests, concurrency=3, seconds=30, at_most=10)
    assert len(load.samples) == 10
    assert summary(load)["errors"] == {"status 503: slots_busy": 5}
    assert load.ended - load.started < 20
