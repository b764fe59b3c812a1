"""`imprint chat`: one question, or a conversation, with the answer shown as it is made."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from serve.cli.client import Client, ClientError
from serve.cli.options import DEFAULT_URL, KeyOption, TenantOption, UrlOption
from serve.cli.output import fail, note, printable

PATH = "/v1/chat/completions"
HELP = "/model NAME changes who answers (imprint, base, or an ID), /reset forgets the conversation, /quit ends it."


def chat(
    message: Annotated[
        list[str] | None, typer.Argument(metavar="MESSAGE", help="One question; without it, a conversation.")
    ] = None,
    model: Annotated[str, typer.Option(help="imprint: the router decides; base; or an ID or alias.")] = "imprint",
    collection: Annotated[str, typer.Option(help="Let the router choose in this collection only.")] = "",
    system: Annotated[str, typer.Option(help="A system message.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    stream: Annotated[bool, typer.Option(help="Show the answer as it is made.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not say which adapter answered.")] = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    tenant: TenantOption = "",
) -> None:
    """Ask once (`imprint chat What is …?`), or talk. Who answered is said on stderr."""
    fields: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "temperature": temperature, "stream": stream}
    if collection:
        fields["collection"] = collection
    question = " ".join(message) if message else ""
    if not question and not sys.stdin.isatty():
        question = sys.stdin.read().strip()
        if not question:
            fail("no question: give one as an argument or on stdin", 2)
    try:
        with Client(url, key, tenant) as client:
            conversation = Conversation(client, fields, system, quiet)
            if question:
                conversation.ask(question)
            else:
                _talk(conversation)
    except ClientError as error:
        fail(str(error))


class Conversation:
    """Messages so far, and how to ask the next one."""

    def __init__(self, client: Client, fields: dict[str, Any], system: str = "", quiet: bool = False) -> None:
        """`fields` go into every request as they are."""
        self.fields = fields
        self._client = client
        self._quiet = quiet
        self._start = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._start)

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self._messages = list(self._start)

    def ask(self, question: str) -> str:
        """Print and return the answer. Raises ClientError; the question then is not remembered."""
        messages = [*self._messages, {"role": "user", "content": question}]
        body = {**self.fields, "messages": messages}
        answer, decision = self._streamed(body) if body["stream"] else self._whole(body)
        self._messages = [*messages, {"role": "assistant", "content": answer}]
        if not self._quiet:
            note(_describe(decision))
        return answer

    def _streamed(self, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        parts: list[str] = []
        with self._client.stream(PATH, body) as (headers, events):
            decision = {
                name: headers.get(f"x-imprint-{header}")
                for name, header in (("adapter_id", "adapter"), ("document_id", "document"), ("reason", "reason"),
                                     ("score", "score"))
            }
            try:
                for event in events:
                    for choice in event.get("choices", []):
                        part = choice.get("delta", {}).get("content") or ""
                        parts.append(part)
                        typer.echo(printable(part, keep="\n\t"), nl=False)
            finally:
                typer.echo("")
        return "".join(parts), decision

    def _whole(self, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        response = self._client.call("POST", PATH, json=body)
        answer = response["choices"][0]["message"].get("content") or ""
        typer.echo(printable(answer, keep="\n\t"))
        return answer, response.get("imprint") or {}


def _talk(conversation: Conversation) -> None:
    note(f"Talking to {conversation.fields['model']}. {HELP}")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo("")
            return
        word, _, rest = line.partition(" ")
        if not line:
            continue
        if word in ("/quit", "/exit"):
            return
        if word == "/reset":
            conversation.reset()
        elif word == "/model" and rest.strip():
            conversation.fields["model"] = rest.strip()
        elif word.startswith("/"):
            note(HELP)
        else:
            try:
                conversation.ask(line)
            except ClientError as error:
                note(f"imprint: {error}")
            except KeyboardInterrupt:
                note("(stopped)")


def _describe(decision: dict[str, Any]) -> str:
    reason = decision.get("reason") or "unknown"
    score = decision.get("score")
    detail = reason if score is None else f"{reason}, score {float(score):.2f}"
    adapter = decision.get("adapter_id")
    if not adapter or adapter == "base":
        return f"[base model: {detail}]"
    document = decision.get("document_id")
    return f"[{document or adapter}: {detail}]"
