"""The running Imprint server as the benchmarks use it: documents, chat, and a word on the machine."""

from __future__ import annotations

import asyncio
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx


@dataclass(frozen=True)
class Answer:
    """What came back for one chat request."""

    content: str
    adapter_id: str | None
    document_id: str | None
    reason: str


class Tenant:
    """One tenant of the server, with its own key."""

    def __init__(self, url: str, key: str) -> None:
        self.client = httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=600)

    async def post(self, title: str, text: str) -> dict[str, Any]:
        """The document once its adapters are there; raises RuntimeError where they never are."""
        document = await self.post_only(title, text)
        return await self.ready(document["id"])

    async def post_only(self, title: str, text: str) -> dict[str, Any]:
        """The answer to POST, at once."""
        response = await self.client.post("/v1/documents", json={"title": title, "text": text})
        return dict(response.raise_for_status().json())

    async def ready(self, document_id: str, poll_s: float = 0.02, limit_s: float = 300) -> dict[str, Any]:
        """Wait until the document's adapters answer, `degraded` ones too: what they know is what is measured."""
        waited = 0.0
        while True:
            document = (await self.client.get(f"/v1/documents/{document_id}")).raise_for_status().json()
            if document["status"] in ("ready", "degraded"):
                return dict(document)
            if document["status"] == "failed" or waited > limit_s:
                raise RuntimeError(f"{document_id} is {document['status']}: {document.get('job')}")
            await asyncio.sleep(poll_s)
            waited += poll_s

    async def chat(self, model: str, question: str, max_tokens: int = 40) -> Answer:
        """The greedy answer to one question."""
        body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0,
                "max_tokens": max_tokens}
        response = (await self.client.post("/v1/chat/completions", json=body)).raise_for_status().json()
        chosen = response["imprint"]
        return Answer((response["choices"][0]["message"]["content"] or "").strip(), chosen["adapter_id"],
                      chosen["document_id"], chosen["reason"])


def machine() -> str:
    """One line on the machine, without its name."""
    model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    flags = Path("/proc/cpuinfo").read_text()
    vector = "AVX512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores ({model}, {vector}), {memory:.0f} GiB, no GPU"
