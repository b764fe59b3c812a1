"""Streamed answers that are read while a test does something else."""

from __future__ import annotations

import json
import threading
import time

from tests.e2e.conftest import Tenant


class ReadStream:
    """A greedy answer of exactly `tokens` tokens, none of them the end of text, read by a thread of its own; the
    constructor waits for its first piece. `text` and `times` (of the pieces, seconds since the epoch) grow until
    `finish`."""

    def __init__(self, tenant: Tenant, model: str, question: str, tokens: int) -> None:
        self.tokens = tokens
        self.adapter = ""
        self.text = ""
        self.times: list[float] = []
        self.error: BaseException | None = None
        self._body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_completion_tokens": tokens,
            "min_tokens": tokens,
            "stream": True,
        }
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(tenant,))
        self._thread.start()
        assert self._begun.wait(60) and self.error is None, self.error

    def finish(self) -> str:
        """The whole text. Raises what went wrong while it was read."""
        self._thread.join(120)
        assert not self._thread.is_alive(), "the stream does not end"
        if self.error is not None:
            raise self.error
        return self.text

    def _read(self, tenant: Tenant) -> None:
        try:
            with tenant.http.stream("POST", "/v1/chat/completions", json=self._body) as response:
                assert response.status_code == 200, response.read()
                self.adapter = response.headers["x-imprint-adapter"]
                done = False
                for line in response.iter_lines():
                    done = line == "data: [DONE]"
                    if line.startswith("data: {"):
                        self._take(json.loads(line.removeprefix("data: ")))
                    if done:
                        break
                assert done, "the stream broke off"
        except BaseException as error:
            self.error = error
        finally:
            self._begun.set()

    def _take(self, event: dict) -> None:
        assert "error" not in event, event
        piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        if piece:
            self.text += piece
            self.times.append(time.time())
            self._begun.set()
