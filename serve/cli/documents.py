"""`imprint document`: post documents to a server and look after them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from serve.cli.client import Client, connected
from serve.cli.options import DEFAULT_URL, JsonOption, KeyOption, TenantOption, UrlOption
from serve.cli.output import fail, note, print_json, print_table, printable, when

app = typer.Typer(no_args_is_help=True, help="Post, list, show, roll back and delete documents.")


class Mode(StrEnum):
    """What a posted text is."""

    DOCUMENT = "document"
    TASK = "task"


PAGE = 100
POLL_S = 0.25
_DONE = ("succeeded", "failed")


@app.command("add")
def add(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Text or Markdown in UTF-8; - for stdin.")],
    title: Annotated[str, typer.Option(help="Title; by default the first heading or line. For one file only.")] = "",
    external_id: Annotated[str, typer.Option(help="Your own ID; posting it again makes a new version.")] = "",
    collection: Annotated[str, typer.Option(help="Group to put the documents in, made if new.")] = "",
    metadata: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="May be repeated.")] = None,
    mode: Annotated[Mode, typer.Option(help="task: the text describes a task, it holds no facts.")] = Mode.DOCUMENT,
    probes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Questions that show whether the document was learned: a JSON array of {"question", "answer"}, where '
            "the answer may be left out. For one file only.",
        ),
    ] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for each adapter; 0: do not wait.")] = 60,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    tenant: TenantOption = "",
    as_json: JsonOption = False,
) -> None:
    """Post documents and wait until their facts can be asked for. Prints their IDs."""
    if len(files) > 1 and (title or external_id or probes):
        fail("--title, --external-id and --probes are for one file", 2)
    fields: dict[str, Any] = {"title": title, "external_id": external_id, "collection": collection}
    fields = {name: value for name, value in fields.items() if value}
    if metadata:
        fields["metadata"] = _parse_metadata(metadata)
    if mode is not Mode.DOCUMENT:
        fields["mode"] = mode.value
    if probes is not None:
        fields["probes"] = _parse_probes(probes)
    # All are read before any is posted, so that a wrong path does not leave half of them on the server.
    texts = [(str(file), _read(file)) for file in files]
    failed = 0
    with connected(url, key, tenant) as client:
        posted = [(name, client.call("POST", "/v1/documents", json={**fields, "text": text})) for name, text in texts]
        for name, document in posted:
            job = _wait(client, document["job"], wait)
            document["job"] = job
            if job["status"] == "succeeded":
                now = client.call("GET", _path(document["id"]))
                document |= {name: now[name] for name in document.keys() & now.keys() - {"job"}}
            typer.echo(json.dumps(document, ensure_ascii=False) if as_json else document["id"])
            failed += job["status"] == "failed"
            note(f"{name}: {_outcome(document, job)}")
            if document["degraded_parts"]:
                for warning in _degraded(client, document):
                    note(f"{name}: warning: {warning}")
    if failed:
        raise typer.Exit(1)


@app.command("list")
def list_documents(
    collection: Annotated[str, typer.Option(help="Only this collection's.")] = "",
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    tenant: TenantOption = "",
    as_json: JsonOption = False,
) -> None:
    """List documents, newest first."""
    with connected(url, key, tenant) as client:
        documents = list(_all(client, "/v1/documents", **({"collection": collection} if collection else {})))
    if as_json:
        print_json(documents)
        return
    rows = [
        [item["id"], item["status"], str(item["version"]), item["collection"] or "-", when(item["updated_at"]),
         item["title"]]
        for item in documents
    ]
    print_table(["ID", "STATUS", "VERSION", "COLLECTION", "UPDATED", "TITLE"], rows)


@app.command("show")
def show(
    document: Annotated[str, typer.Argument(help="A document's ID or your own external ID.")],
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    tenant: TenantOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show a document: what is known about it, then its text."""
    with connected(url, key, tenant) as client:
        found = client.call("GET", _path(document))
    if as_json:
        print_json(found)
        return
    names = ("id", "title", "mode", "status", "version", "latest_version", "current_version", "adapter_id",
             "external_id", "collection")
    for name in names:
        if found.get(name) is not None:
            typer.echo(f"{name}: {printable(str(found[name]))}")
    if len(found["adapter_ids"]) > 1:
        typer.echo(f"adapter_ids: {' '.join(found['adapter_ids'])}")
    job = found.get("job") or {}
    if job.get("error"):
        typer.echo(f"error: {printable(job['error'])}")
    typer.echo("")
    typer.echo(printable(found["text"], keep="\n\t"))


@app.command("versions")
def versions(
    document: Annotated[str, typer.Argument(help="A document's ID or your own external ID.")],
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    tenant: TenantOption = "",
    as_json: JsonOption = False,
) -> None:
    """List a document's versions, newest first. The one marked * is served."""
    with connected(url, key, tenant) as client:
        found = list(_all(client, f"{_path(document)}/versions"))
    if as_json:
        print_json(found)
        return
    rows = [
        [f"{item['version']}{'*' if item['current'] else ''}", item["status"], when(item["created_at"]),
         " ".join(item["adapter_ids"]) or "-", item["title"]]
        for item in found
    ]
    print_table(["VERSION", "STATUS", "POSTED", "ADAPTERS", "TITLE"], rows)


@app.command("rollback")
def rollback(
    document: Annotated[str, typer.Argument(help="A document's ID or your own external ID.")],
    version: Annotated[
        int | None,
        typer.Option(min=1, help="Version to serve; by default the newest before this one that can be at once."),
    ] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait where adapters must be made again.")] = 60,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    tenant: TenantOption = "",
    as_json: JsonOption = False,
) -> None:
    """Serve an earlier version of a document again, from the next request on."""
    with connected(url, key, tenant) as client:
        done = client.call("POST", f"{_path(document)}/rollback", json={"version": version})
        job = _wait(client, done["job"], wait)
        if job["status"] != done["job"]["status"]:
            now = client.call("GET", _path(document))
            done |= {name: now[name] for name in done.keys() & now.keys()}
    if as_json:
        print_json(done)
    else:
        typer.echo(done["id"])
    note(f"version {done['version']}: {_outcome(done, job)}")
    if job["status"] == "failed":
        raise typer.Exit(1)


@app.command("delete")
def delete(
    documents: Annotated[list[str], typer.Argument(metavar="DOCUMENT", help="IDs or your own external IDs.")],
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    tenant: TenantOption = "",
) -> None:
    """Delete documents with all their versions and adapters, for good."""
    with connected(url, key, tenant) as client:
        for document in documents:
            answer = client.call("DELETE", _path(document))
            note(f"{answer['id']} is deleted")


def _path(document: str) -> str:
    return f"/v1/documents/{quote(document, safe='')}"


def _read(file: Path) -> str:
    try:
        raw = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        fail(f"{file} cannot be read: {error.strerror}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        fail(f"{file} is not UTF-8 text (byte {error.start})")


def _parse_metadata(pairs: list[str]) -> dict[str, str]:
    metadata = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            fail(f"--metadata takes NAME=VALUE, not '{pair}'", 2)
        metadata[name] = value
    return metadata


def _parse_probes(file: Path) -> list[Any]:
    try:
        probes = json.loads(_read(file))
    except ValueError as error:
        fail(f"{file} is not JSON: {error}")
    if not isinstance(probes, list):
        fail(f'{file} must hold a JSON array of {{"question": ..., "answer": ...}}')
    return probes


def _wait(client: Client, job: dict[str, Any], seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while job["status"] not in _DONE and time.monotonic() < deadline:
        time.sleep(POLL_S)
        job = client.call("GET", f"/v1/jobs/{job['id']}")
    return job


def _outcome(document: dict[str, Any], job: dict[str, Any]) -> str:
    if job["status"] == "failed":
        return f"failed: {printable(job['error'] or 'no reason given')}"
    if job["status"] == "succeeded":
        state = "ready" if document["status"] == "ready" else f"done, but the document is {document['status']}"
        if not document.get("created", True):
            return f"was there already, {state}"
        return f"{state} as {' '.join(document['adapter_ids'])}" if document["adapter_ids"] else state
    return f"stored; the adapter is still being made ({job['stage'] or job['status']})"


def _degraded(client: Client, document: dict[str, Any]) -> Iterator[str]:
    """What the quality gate had to say against each adapter of a document that did not pass."""
    for adapter_id in document["adapter_ids"]:
        adapter = client.call("GET", f"/v1/adapters/{adapter_id}")
        if adapter["status"] == "degraded":
            gate = adapter["manifest"].get("gate") or {}
            reasons = "; ".join(gate.get("reasons") or ()) or "no reason given"
            part = f" (part {adapter['part'] + 1} of {adapter['parts']})" if adapter["parts"] > 1 else ""
            yield printable(f"{adapter_id}{part} did not pass the quality gate and is not routed to: {reasons}")


def _all(client: Client, path: str, **parameters: Any) -> Iterator[dict[str, Any]]:
    """The items of all pages of a list."""
    parameters["limit"] = PAGE
    while True:
        page = client.call("GET", path, params=parameters)
        yield from page["data"]
        if not page.get("next_cursor"):
            return
        parameters["cursor"] = page["next_cursor"]
