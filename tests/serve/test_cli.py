"""The `imprint` command: keys on a real registry, the rest over real HTTP against the API with scripted models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
from typer.testing import CliRunner, Result

from serve.cli import app
from serve.cli.client import Client, ClientError
from serve.cli.output import printable
from serve.config import load_serve_file
from serve.registry import Registry
from tests.serve.api_helpers import Api, make_api
from tests.serve.registry_helpers import centroids, make_ready, new_adapter, several_parts

IMPRINT = Path(sysconfig.get_path("scripts")) / "imprint"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("IMPRINT_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config file whose registry does not exist yet."""
    file = tmp_path / "test.yaml"
    file.write_text(
        "http_options: {host: 127.0.0.1, port: 1}\n"
        "applications:\n"
        f"  - {{name: imprint, import_path: 'serve.app:build', args: {{data_dir: {tmp_path / 'data'}}}}}\n"
    )
    return file


@dataclass
class Running:
    """An API on a port of its own."""

    api: Api
    url: str

    def run(self, *arguments: str, key: str | None = None, text: str | None = None) -> Result:
        """Run a command as the holder of a key, by default the first tenant's."""
        environment = {"IMPRINT_URL": self.url, "IMPRINT_KEY": self.api.key if key is None else key}
        return CliRunner().invoke(app, arguments, env=environment, input=text)


def _tenant(server: Running) -> str:
    tenant = server.api.registry.get_tenant("acme")
    assert tenant is not None
    return tenant.id


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    # As a server that also takes tasks; no generator is there to open the checkpoint.
    api = make_api(tmp_path, generator={"task": {"checkpoint": "tasks", "encoder": "encoder"}})
    uvicorn_server = uvicorn.Server(uvicorn.Config(api.app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=uvicorn_server.run)
    thread.start()
    while not uvicorn_server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
    yield Running(api, f"http://127.0.0.1:{port}")
    uvicorn_server.should_exit = True
    thread.join()
    api.registry.close()


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, arguments, env=environment)


# Keys on the local registry


def test_created_key_is_all_of_stdout_and_works(config: Path) -> None:
    command = [IMPRINT, "key", "create", "--tenant", "acme", "--config", str(config)]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert result.returncode == 0, result.stderr
    secret = result.stdout.removesuffix("\n")
    assert secret.split() == [secret] and secret.startswith("imp_")
    registry = Registry.open(load_serve_file(config).config.registry.url)
    principal = registry.authenticate(secret)
    assert principal is not None
    assert (principal.scope, [tenant.name for tenant in principal.tenants]) == ("tenant", ["acme"])
    registry.close()


def test_keys_are_listed_without_text_and_revoked(config: Path) -> None:
    secret = run("key", "create", "--tenant", "acme", "--label", "laptop", "--config", str(config)).stdout.strip()
    run("key", "create", "--scope", "service", "--tenant", "acme", "--tenant", "globex", "--config", str(config))
    run("key", "create", "--scope", "admin", "--config", str(config))
    listed = run("key", "list", "--json", "--config", str(config))
    keys = json.loads(listed.stdout)
    assert [(key["scope"], key["tenants"]) for key in keys] == [
        ("admin", []), ("service", ["acme", "globex"]), ("tenant", ["acme"])
    ]
    assert secret not in listed.stdout
    key_id = keys[-1]["id"]
    assert run("key", "revoke", key_id, "--config", str(config)).exit_code == 0
    table = run("key", "list", "--config", str(config)).stdout.splitlines()
    assert [line for line in table if key_id in line and "revoked" in line and "laptop" in line]
    registry = Registry.open(load_serve_file(config).config.registry.url)
    assert registry.authenticate(secret) is None
    registry.close()


@pytest.mark.parametrize(
    "arguments",
    [
        ["create"],
        ["create", "--tenant", "a", "--tenant", "b"],
        ["create", "--scope", "service"],
        ["create", "--scope", "admin", "--tenant", "a"],
        ["revoke", "doc_123"],
    ],
)
def test_key_commands_that_make_no_sense_change_nothing(config: Path, arguments: list[str]) -> None:
    result = run("key", *arguments, "--config", str(config))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert not (config.parent / "data").exists()


def test_key_failures_are_one_line(config: Path, tmp_path: Path) -> None:
    unknown = run("key", "revoke", "key_" + "0" * 26, "--config", str(config))
    assert unknown.exit_code == 1 and "no key" in unknown.stderr
    bad_name = run("key", "create", "--tenant", "no/slash allowed", "--config", str(config))
    assert bad_name.exit_code == 1 and bad_name.stdout == ""
    no_config = run("key", "list", "--config", str(tmp_path / "none.yaml"))
    assert no_config.exit_code == 1 and "none.yaml" in no_config.stderr
    assert all("Traceback" not in result.stderr for result in (unknown, bad_name, no_config))


# Keys over HTTP


def test_keys_over_http_need_an_admin_key(server: Running) -> None:
    refused = server.run("key", "create", "--tenant", "new")
    assert refused.exit_code == 1 and "admin key" in refused.stderr and refused.stdout == ""
    created = server.run("key", "create", "--tenant", "new", key=server.api.admin_key)
    secret = created.stdout.strip()
    principal = server.api.registry.authenticate(secret)
    assert principal is not None and principal.tenants[0].name == "new"
    service = server.run("key", "create", "--scope", "service", "--tenant", "new", key=server.api.admin_key)
    assert service.exit_code == 0, service.stderr
    keys = json.loads(server.run("key", "list", "--json", key=server.api.admin_key).stdout)
    assert len(keys) == 5
    revoked = server.run("key", "revoke", principal.key_id, key=server.api.admin_key)
    assert revoked.exit_code == 0, revoked.stderr
    assert server.api.registry.authenticate(secret) is None


def test_local_registry_can_be_asked_for_despite_the_environment(server: Running, config: Path) -> None:
    result = server.run("key", "create", "--tenant", "acme", "--local", "--config", str(config))
    assert result.exit_code == 0, result.stderr
    assert server.api.registry.authenticate(result.stdout.strip()) is None


# Documents


def test_document_add_list_show_delete(server: Running, tmp_path: Path) -> None:
    file = tmp_path / "notice.md"
    file.write_text("# Opening hours\n\nThe café opens at 09:15.\n", encoding="utf-8")
    added = server.run("document", "add", str(file), "--wait", "0", "--collection", "notices",
                       "--external-id", "notices/n-1.md", "--metadata", "by=ada=x")
    assert added.exit_code == 0, added.stderr
    document_id = added.stdout.strip()
    listed = server.run("document", "list", "--collection", "notices").stdout
    assert document_id in listed and "Opening hours" in listed
    shown = json.loads(server.run("document", "show", "notices/n-1.md", "--json").stdout)
    assert shown["id"] == document_id and shown["metadata"] == {"by": "ada=x"}
    assert "The café opens at 09:15." in server.run("document", "show", document_id).stdout
    assert server.run("document", "list", key=server.api.other_key).stdout.count("\n") == 1
    assert server.run("document", "delete", "notices/n-1.md").exit_code == 0
    gone = server.run("document", "show", document_id)
    assert gone.exit_code == 1 and document_id in gone.stderr


def test_document_versions_and_rollback(server: Running) -> None:
    registry = server.api.registry
    first = make_ready(registry, _tenant(server), "Menu", "Soup costs 4 euros.", external_id="menu")
    second = make_ready(registry, _tenant(server), "Menu", "Soup costs 5 euros.", external_id="menu")
    listed = server.run("document", "versions", "menu").stdout
    assert "2*" in listed and str(first.adapter_id) in listed and str(second.adapter_id) in listed
    back = server.run("document", "rollback", "menu")
    assert back.exit_code == 0 and back.stdout.strip() == first.document_id
    assert f"version 1: ready as {first.adapter_id}" in back.stderr
    versions = json.loads(server.run("document", "versions", "menu", "--json").stdout)
    assert [(one["version"], one["current"]) for one in versions] == [(2, False), (1, True)]
    forward = json.loads(server.run("document", "rollback", "menu", "--version", "2", "--json").stdout)
    assert forward["adapter_ids"] == [second.adapter_id] and forward["current_version"] == 2
    unknown = server.run("document", "rollback", "menu", "--version", "7")
    assert unknown.exit_code == 1 and "versions 1 to 2" in unknown.stderr and unknown.stdout == ""


def test_document_add_reads_stdin_and_waits_for_the_adapter(server: Running) -> None:
    registry = server.api.registry
    event = make_ready(registry, _tenant(server), "Menu", "Soup costs 4 euros.")
    added = server.run("document", "add", "-", "--title", "Menu", text="Soup costs 4 euros.")
    assert added.stdout.strip() == event.document_id
    assert "ready" in added.stderr


def test_document_add_reports_a_failed_job(server: Running) -> None:
    def fail_it() -> None:
        while not (leased := server.api.registry.lease_jobs("w", 1, 60)):
            time.sleep(0.01)
        server.api.registry.fail_job(leased[0].job.id, "w", "The document is \x1b[31mtoo odd.")

    worker = threading.Thread(target=fail_it)
    worker.start()
    added = server.run("document", "add", "-", text="Soup costs 4 euros.")
    worker.join()
    assert added.exit_code == 1
    assert "too odd" in added.stderr and "\x1b" not in added.stderr


def test_document_add_says_what_the_quality_gate_found(server: Running) -> None:
    """A degraded document is stored and can be pinned: a warning with the reasons, but no failure."""
    said = ["the score 0.10 is below 0.50", "it says \x1b[31mthe same to all"]
    gates = [{"reasons": ["no_probes"]}, {"reasons": said}, {}]
    parts = [
        (new_adapter(state=state, part=part, parts=3, manifest={"gate": gate}), centroids())
        for part, (state, gate) in enumerate(zip(("degraded", "degraded", "degraded"), gates, strict=True))
    ]
    event = make_ready(server.api.registry, _tenant(server), "Menu", "Soup costs 4 euros.", parts)
    added = server.run("document", "add", "-", "--title", "Menu", "--json", text="Soup costs 4 euros.")
    assert added.exit_code == 0, added.stderr
    document = json.loads(added.stdout)
    assert (document["id"], document["status"]) == (event.document_id, "degraded")
    assert document["adapter_ids"] == [adapter.id for adapter, _ in parts]
    warnings = [line for line in added.stderr.splitlines() if "warning" in line]
    assert len(warnings) == 3 and parts[1][0].id in warnings[1] and "part 2 of 3" in warnings[1]
    assert "the score 0.10 is below 0.50; it says [31mthe same to all" in warnings[1]
    assert "no reason given" in warnings[2] and "part 3 of 3" in warnings[2]
    assert "done, but the document is degraded" in added.stderr
    shown = server.run("document", "show", event.document_id).stdout
    assert "status: degraded" in shown and all(adapter.id in shown for adapter, _ in parts)


def test_document_add_shows_the_state_after_waiting(server: Running) -> None:
    def make_it() -> None:
        while not (leased := server.api.registry.lease_jobs("w", 1, 60)):
            time.sleep(0.01)
        server.api.registry.publish(leased[0].job.id, "w", several_parts(2))

    worker = threading.Thread(target=make_it)
    worker.start()
    added = server.run("document", "add", "-", "--json", text="Soup costs 4 euros.")
    worker.join()
    document = json.loads(added.stdout)
    assert (added.exit_code, document["status"], document["created"]) == (0, "ready", True)
    assert len(document["adapter_ids"]) == 2 and document["job"]["status"] == "succeeded"
    assert f"ready as {' '.join(document['adapter_ids'])}" in added.stderr and "warning" not in added.stderr


def test_document_add_sends_mode_and_probes(server: Running, tmp_path: Path) -> None:
    probes = tmp_path / "probes.json"
    probes.write_text('[{"question": "Was kostet die Suppe?", "answer": "4 €"}, {"question": "Since when?"}]', "utf-8")
    added = server.run("document", "add", "-", "--wait", "0", "--mode", "task", "--probes", str(probes), text="Rhyme.")
    assert added.exit_code == 0, added.stderr
    shown = json.loads(server.run("document", "show", added.stdout.strip(), "--json").stdout)
    assert shown["mode"] == "task" and shown["probes"] == [
        {"question": "Was kostet die Suppe?", "answer": "4 €"}, {"question": "Since when?", "answer": None}
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not JSON"),
        ('{"question": "When?"}', "JSON array"),
        ('[{"answer": "x"}]', "probes.0.question"),
        ("[]", "probes"),
        (None, "cannot be read"),
    ],
)
def test_bad_probes_are_refused(server: Running, tmp_path: Path, content: str | None, message: str) -> None:
    probes = tmp_path / "probes.json"
    if content is not None:
        probes.write_text(content)
    added = server.run("document", "add", "-", "--probes", str(probes), text="Soup.")
    assert added.exit_code == 1 and message in added.stderr and not added.stdout
    assert json.loads(server.run("document", "list", "--json").stdout) == []


def test_options_of_one_document_are_refused_for_two(server: Running, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "probes.json"):
        (tmp_path / name).write_text("[]")
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    for option in (("--probes", str(tmp_path / "probes.json")), ("--title", "T"), ("--external-id", "e")):
        assert server.run("document", "add", *files, *option).exit_code == 2
    assert server.run("document", "add", files[0], "--mode", "other").exit_code == 2
    assert json.loads(server.run("document", "list", "--json").stdout) == []


def test_document_list_follows_pages(server: Running) -> None:
    for number in range(101):
        server.api.registry.post_document(_tenant(server), f"Title {number}", f"text {number}")
    listed = json.loads(server.run("document", "list", "--json").stdout)
    assert len({item["id"] for item in listed}) == 101


def test_unreadable_files_stop_before_anything_is_posted(server: Running, tmp_path: Path) -> None:
    good, latin = tmp_path / "good.txt", tmp_path / "latin.txt"
    good.write_text("Fine.")
    latin.write_bytes("Café".encode("latin-1"))
    assert "not UTF-8" in server.run("document", "add", str(good), str(latin)).stderr
    assert "cannot be read" in server.run("document", "add", str(good), str(tmp_path / "none.txt")).stderr
    assert json.loads(server.run("document", "list", "--json").stdout) == []


def test_service_key_names_its_tenant(server: Running) -> None:
    _, secret = server.api.registry.create_key(None, "service", tenants=["acme", "globex"])
    assert "X-Tenant-ID" in server.run("document", "list", key=secret).stderr
    assert server.run("document", "list", "--tenant", "globex", key=secret).exit_code == 0


def test_client_errors_say_what_to_do(server: Running) -> None:
    assert "imprint key create" in server.run("document", "list", key="").stderr
    assert "not valid" in server.run("document", "list", key="imp_wrong").stderr
    assert "no Imprint key has" in server.run("document", "list", key="imp_\u20ac").stderr
    silent = run("document", "list", IMPRINT_URL="http://127.0.0.1:1", IMPRINT_KEY="imp_x")
    assert silent.exit_code == 1 and "make serve" in silent.stderr
    assert "not a URL" in run("document", "list", IMPRINT_URL="127.0.0.1", IMPRINT_KEY="imp_x").stderr


# Chat


def answer(text: str) -> dict[str, object]:
    return {"id": "x", "object": "chat.completion", "choices": [{"index": 0, "message": {"content": text}}]}


def events(*parts: str) -> list[str]:
    chunks = [{"id": "x", "choices": [{"index": 0, "delta": {"content": part}}]} for part in parts]
    return [*(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks), "data: [DONE]\n\n"]


def test_chat_streams_one_answer(server: Running) -> None:
    event = make_ready(server.api.registry, _tenant(server), "Hours", "It opens at 09:15.")
    server.api.router.decision = {
        "adapter_id": event.adapter_id, "document_id": event.document_id, "reason": "matched", "score": 0.71
    }
    server.api.engine.events = events("It opens", " at \x1b[2J09:15.")
    result = server.run("chat", "When", "does", "it", "open?", "--max-tokens", "7")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "It opens at [2J09:15.\n"
    assert "matched" in result.stderr and "0.71" in result.stderr and str(event.document_id) in result.stderr
    _, body, _ = server.api.engine.calls[0]
    assert body["messages"] == [{"role": "user", "content": "When does it open?"}]
    assert (body["stream"], body["max_tokens"], body["temperature"]) == (True, 7, 0.0)


def test_chat_without_streaming_reads_stdin(server: Running) -> None:
    server.api.engine.answer = answer("Hello.")
    result = server.run("chat", "--no-stream", "--quiet", "--model", "base", "--system", "Be short.", text="Hi\n")
    assert (result.stdout, result.stderr) == ("Hello.\n", "")
    assert [message["role"] for message in server.api.engine.calls[0][1]["messages"]] == ["system", "user"]


def test_chat_shows_errors(server: Running) -> None:
    unknown = server.run("chat", "--model", "doc_nothing", "Hi")
    assert unknown.exit_code == 1 and "doc_nothing" in unknown.stderr
    server.api.engine.events = [*events("Half")[:1], 'data: {"error": {"message": "The engine died."}}\n\n']
    broken = server.run("chat", "--model", "base", "Hi")
    assert broken.exit_code == 1 and "The engine died." in broken.stderr
    assert server.run("chat", text="").exit_code == 2


def test_conversation_keeps_and_forgets_turns(server: Running) -> None:
    """In a terminal of its own, as a person would."""
    pty = pytest.importorskip("pty")
    parent, child = pty.openpty()
    server.api.engine.events = events("Yes.")
    environment = {**os.environ, "IMPRINT_URL": server.url, "IMPRINT_KEY": server.api.key, "TERM": "dumb"}
    process = subprocess.Popen([IMPRINT, "chat"], stdin=child, stdout=child, stderr=child, env=environment)
    os.close(child)
    try:
        for line in ("One?", "Two?", "/reset", "/model base", "Three?", "/quit"):
            os.write(parent, f"{line}\n".encode())
        seen = b""
        while True:
            try:
                seen += os.read(parent, 4096)
            except OSError:  # the other end is closed
                break
        assert process.wait(timeout=60) == 0, seen.decode()
    finally:
        process.kill()
        os.close(parent)
    asked = [body["messages"] for _, body, _ in server.api.engine.calls]
    assert [[message["content"] for message in messages] for messages in asked] == [
        ["One?"], ["One?", "Yes.", "Two?"], ["Three?"]
    ]
    assert [len(server.api.router.calls), server.api.engine.calls[-1][1]["model"]] == [2, "base"]


# The rest


def test_commands_are_the_documented_ones() -> None:
    result = subprocess.run([IMPRINT, "--help"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0
    for name in ("serve", "key", "document", "chat", "train", "eval", "doctor"):
        assert f" {name} " in result.stdout
    assert run("--version").stdout.strip().count(".") == 2


def test_the_command_starts_without_heavy_imports() -> None:
    code = "import sys, serve.cli; print([n for n in ('torch', 'ray', 'vllm', 'transformers') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[]", result.stderr


def test_serve_refuses_a_bad_config(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("applications: [{args: {engine: {max_lora: 4}}}]")
    result = run("serve", str(bad))
    assert result.exit_code == 2
    assert "engine.max_lora" in result.stderr


def test_eval_needs_a_key_and_a_server() -> None:
    assert run("eval").exit_code == 2
    assert "there is no file" in run("eval", "--hand-written", "none.jsonl", IMPRINT_KEY="imp_x").stderr


def test_train_help_names_nano() -> None:
    assert "nano" in run("train", "--help").stdout


def test_doctor_reports_a_bad_config(tmp_path: Path) -> None:
    result = run("doctor", "--json", str(tmp_path / "none.yaml"))
    assert result.exit_code == 1
    levels = {item["topic"]: item["level"] for item in json.loads(result.stdout)}
    assert levels["config"] == "problem"
    assert {"python", "engine", "torch", "threads", "cpu", "gpu", "memory"} <= set(levels)


def test_doctor_names_missing_weights(config: Path) -> None:
    text = config.read_text().replace("args: {", "args: {base: {model: /nowhere/model}, ")
    config.write_text(text)
    result = run("doctor", str(config))
    assert result.exit_code == 1
    assert "/nowhere/model" in result.stdout and "cannot serve" in result.stdout


def test_doctor_is_content_with_what_can_serve(config: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("config.json", "model.safetensors"):
        (weights / name).touch()
    places = f"base: {{model: {weights}}}, generator: {{checkpoint: {weights}}}, "
    config.write_text(config.read_text().replace("args: {", "args: {" + places))
    result = run("doctor", str(config))
    assert result.exit_code == 0, result.stdout
    assert f"This machine can serve {config}" in result.stdout
    assert not (tmp_path / "data").exists()


def test_doctor_shows_where_a_relative_data_folder_is(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text(config.read_text().replace(f"data_dir: {tmp_path / 'data'}", "data_dir: .here"))
    monkeypatch.chdir(tmp_path)
    assert f"{tmp_path / '.here'} will be made at the first start" in run("doctor", str(config)).stdout


def test_control_characters_are_not_printed() -> None:
    assert printable("a\x1b]0;x\x07b\u009bc\nd\té") == "a]0;xbcdé"
    assert printable("a\nb\x00", keep="\n") == "a\nb"


def test_an_answer_that_is_no_json_is_named() -> None:
    page = httpx.MockTransport(lambda _: httpx.Response(200, text="<html>"))
    with Client("http://example.org", "imp_x", transport=page) as client:
        with pytest.raises(ClientError, match="Imprint server"):
            client.call("GET", "/v1/documents")
