"""What no client should send: paths that climb, names that forge, bodies without end; and where secrets turn up."""

from __future__ import annotations

import io
import json
import logging
import re
import struct
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from tests.server.doors import Caller, caller
from tests.server.guarded import MAX_UPLOAD, NAME, Guarded

from lorikeet.registry.records import Actor
from lorikeet.server.auth import demand_of
from lorikeet.server.logs import FORMAT, LineFormatter

CLIMBING = [
    "../../../../etc/passwd", "..%2f..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "%2fetc%2fpasswd",
    "..%5c..%5cetc%5cpasswd", "%00", "..", "file:%2f%2f%2fetc%2fpasswd", "%252e%252e%252fetc", "a" * 4000, "%ff%fe",
]  # fmt: skip
NOTHING = '{"items":[],"next":null}'  # the history of an alias that never was
FORGED = "x%0d%0aset-cookie:%20a=b%0d%0aERROR:%20%20%20%20%20forged:%20line"
NAMES = [
    "../x",
    "..",
    ".",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a\0b",
    "a\r\nb",
    "a b",
    "",
    "a" * 200,
    "-x",
    "\u202ex",
    "a%2fb",
    "COM1:",
]
RECORD = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL): {5}[\w.]+: |Traceback|    ")


def keyed(guarded: Guarded, role: str = "admin") -> Caller:
    """Of a tenant of its own: what comes of it is nobody else's."""
    tenant = guarded.catalog.people.create_tenant(Actor(), f"t-{uuid.uuid4().hex}")
    return caller(guarded.catalog, "key", role, tenant.id)


def test_no_name_leads_out_of_its_folder(guarded: Guarded) -> None:
    """Each parameter of each route in turn, the others being right: refused, without a byte of a file elsewhere."""
    tried = 0
    outside = sorted(guarded.home.parent.iterdir())
    before = guarded.snapshot()
    for door in guarded.doors:
        if door.method == "WS":
            continue
        for parameter in door.parameters:
            for text in [*CLIMBING, FORGED]:
                names = guarded.names | {"token": "x", "version": "x", "rest": "x"} | {parameter: text}
                who = guarded.admin if not demand_of(door.endpoint).operator else guarded.root
                more = {} if door.method in ("GET", "DELETE") else {"json": {}}
                reply = guarded.send(door.method, door.filled(**names), who, **more)
                said = (door.name, parameter, text[:40], reply.status_code, reply.text[:200])
                fine = 400 <= reply.status_code < 500 or reply.status_code in (307, 501) or reply.text == NOTHING
                assert fine, said
                assert "root:" not in reply.text and "set-cookie" not in reply.headers, said
                tried += 1
    assert tried > 1000
    assert sorted(guarded.home.parent.iterdir()) == outside
    assert guarded.snapshot() == before


@pytest.mark.parametrize("name", NAMES)
def test_no_such_name_is_ever_given(guarded: Guarded, name: str) -> None:
    who = keyed(guarded)
    for path, body in (
        ("/api/repos", {"name": name}), ("/api/keys", {"name": name}), ("/api/users", {"name": name}),
        ("/api/datasets", {"name": name, "rows": [{"text": "x", "label": "y"}]}), ("/v2/repos", {"name": name}),
        ("/api/jobs", {"repo": name, "dataset": name, "recipe": {"prompt": "{text}", "completion": "{label}"}}),
        ("/v1/completions", {"model": name or "/", "prompt": [7]}),
        ("/v1/completions", {"model": f"{name}@production", "prompt": [7]}),
        ("/generate", {"inputs": "x", "parameters": {"adapter_id": f"{name}/1"}}),
    ):  # fmt: skip
        reply = guarded.send("POST", path, who, json=body)
        assert 400 <= reply.status_code < 500, (path, body, reply.text)
    reply = guarded.send("POST", "/api/tenants", guarded.root, json={"name": name})
    assert 400 <= reply.status_code < 500
    assert guarded.send("GET", "/api/repos", who).json()["items"] == []


def test_files_of_an_upload_have_plain_names(guarded: Guarded) -> None:
    who = keyed(guarded)
    guarded.send("POST", "/api/repos", who, json={"name": "mine"})
    outside = sorted(guarded.home.parent.iterdir())
    for name in ("../../escape.safetensors", "/tmp/escape", "..", "a/../../b", "adapter_config.json\0.txt", "a\r\nb"):
        files = {"file": (name, b"{}", "application/octet-stream")}
        reply = guarded.send("POST", "/api/repos/mine/versions", who, files=files)
        assert 400 <= reply.status_code < 500, (name, reply.text)
        reply = guarded.send("POST", "/api/datasets", who, files=files, data={"name": "mine"})
        assert 400 <= reply.status_code < 500, (name, reply.text)
    assert sorted(guarded.home.parent.iterdir()) == outside


# --- the log ------------------------------------------------------------------------------------------------------


def test_the_log_cannot_be_forged(guarded: Guarded) -> None:
    evil = "x\r\nERROR:     forged: \x1b[31mline\u2028"
    headers = {"user-agent": "x ERROR forged", "x-request-id": "1"}
    for path in ("/" + FORGED, f"/v1/models/{FORGED}", f"/api/repos/{FORGED}", f"/v1/adapters/{FORGED}/pin"):
        for method in ("GET", "POST", "DELETE"):
            guarded.send(method, path, guarded.admin, headers=headers)
    for body in ({"model": evil, "prompt": [7]}, {"model": f"hf://{evil}", "prompt": [7]}, {evil: evil}):
        guarded.send("POST", "/v1/completions", guarded.admin, json=body)
    logging.getLogger("lorikeet.server").warning("a name: %s", evil)
    lines = guarded.log.getvalue().splitlines()
    assert any("a name: " in line for line in lines)
    assert not any(line.startswith("ERROR:     forged") for line in lines)
    assert all(RECORD.match(line) for line in lines if line), [
        line for line in lines if line and not RECORD.match(line)
    ]


def test_records_stay_on_their_lines_and_keys_are_cut() -> None:
    formatter = LineFormatter(FORMAT)
    secret = "lk_" + "A1b2-_" * 7
    try:
        raise ValueError(f"first\nERROR:     forged: {secret}\r\x1b[2J")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    message = "%s \u2028\x85 authorization: Bearer %s"
    record = logging.LogRecord("lorikeet", logging.ERROR, "f", 1, message, ("a\nb\tc\x00", secret), info)
    first, *rest = formatter.format(record).split("\n")
    assert first == "ERROR:     lorikeet: a\\nb\tc\\x00 \\u2028\\x85 authorization: Bearer ..."
    assert all(line.startswith("    ") for line in rest) and secret not in "".join(rest) and "\x1b" not in "".join(rest)


# --- bodies -------------------------------------------------------------------------------------------------------


def test_every_route_that_reads_a_body_stops_in_time(guarded: Guarded) -> None:
    """Announced and not, as JSON and as a form: 413, or never read at all."""
    size = 2**20 + MAX_UPLOAD
    unread = set()

    def chunks() -> Iterator[bytes]:
        for _ in range(size // 2**14):
            yield b" " * 2**14

    for door in guarded.doors:
        if door.method not in ("POST", "PUT", "PATCH") or demand_of(door.endpoint).public:
            continue
        who = guarded.root if demand_of(door.endpoint).operator else guarded.admin
        path = door.filled(**guarded.names)
        for content in (b" " * size, chunks()):
            reply = guarded.send(door.method, path, who, content=content, headers={"content-type": "application/json"})
            if reply.status_code != 413:
                assert reply.status_code >= 400 or "read" not in reply.text, (door.name, reply.text)
                unread.add(door.name)
        form = {"content-type": "multipart/form-data; boundary=x"}
        reply = guarded.send(door.method, path, who, content=b"--x\r\n" + b" " * size, headers=form)
        assert reply.status_code >= 400 or door.name in unread, (door.name, reply.text)
    assert {name for name in unread if not _reads_nothing(name)} == set()


def _reads_nothing(name: str) -> bool:
    """Routes whose path says all, and those of the protocols that are not supported."""
    return name.endswith(("/cancel", "/resume", "/{action}", "/v1/embeddings")) or "/v2/" in name


def test_uploads_that_are_bombs(guarded: Guarded, adapters: Any) -> None:
    who = keyed(guarded)
    guarded.send("POST", "/api/repos", who, json={"name": "mine"})
    config = (adapters("llama", 1)[0] / "adapter_config.json").read_bytes()
    squeezed = io.BytesIO()
    with zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapter_model.safetensors", b"\0" * 50 * 2**20)
    entry = {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}
    huge = json.dumps({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": entry}).encode()
    nested = b'{"a":' * 20_000 + b"1" + b"}" * 20_000
    weights = {
        "zip": squeezed.getvalue(),
        "endless header": struct.pack("<Q", 2**63) + b"{}",
        "header beyond the file": struct.pack("<Q", 10**6) + b"{}",
        "tensors of petabytes": struct.pack("<Q", len(huge)) + huge,
        "nested header": struct.pack("<Q", len(nested)) + nested,
        "pickle": b"\x80\x04cposix\nsystem\n(S'true'\ntR.",
        "empty": b"",
    }
    for what, data in weights.items():
        files = [
            ("files", ("adapter_config.json", config, "application/json")),
            ("files", ("adapter_model.safetensors", data, "application/octet-stream")),
        ]
        reply = guarded.send("POST", "/api/repos/mine/versions", who, files=files)
        assert 400 <= reply.status_code < 500, (what, reply.status_code, reply.text)
    for what, data in {"zip": squeezed.getvalue(), "nested": nested, "zeros": b"\0" * 1000}.items():
        files = {"file": ("rows.jsonl", data, "application/x-ndjson")}
        reply = guarded.send("POST", "/api/datasets", who, files=files, data={"name": "bomb"})
        assert 400 <= reply.status_code < 500, (what, reply.status_code, reply.text)
    reply = guarded.send("POST", "/v1/completions", who, content=nested)
    assert 400 <= reply.status_code < 500
    assert guarded.send("GET", "/api/repos/mine", who).json()["versions"] == []
    assert guarded.send("GET", "/api/datasets", who).json()["items"] == []


# --- secrets ------------------------------------------------------------------------------------------------------


def test_secrets_turn_up_nowhere(guarded: Guarded) -> None:
    """A key, one that opens nothing, and a token for a source: driven everywhere, looked for everywhere."""
    made = guarded.send("POST", "/api/keys", keyed(guarded), json={"name": "mine", "role": "admin"}).json()
    mine = Caller(guarded.admin.key, made["secret"])
    wrong = Caller(guarded.admin.key, "lk_" + uuid.uuid4().hex + uuid.uuid4().hex)
    token = "hf_" + uuid.uuid4().hex
    replies = []
    for who in (mine, wrong):
        for method, path, body in (
            ("GET", "/api/me", None), ("GET", "/api/keys", None), ("GET", "/api/audit", None),
            ("GET", "/nothing", None),
            ("POST", "/v1/completions", {"prompt": [7], "max_tokens": 1}), ("POST", "/v1/completions", {"prompt": 5}),
            ("POST", "/v1/completions", {"model": "hf://a/b", "prompt": "x", "api_token": token}),
            ("POST", "/v1/completions", {"model": "https://127.0.0.1:9/a", "prompt": "x", "api_token": token}),
            ("POST", "/v1/completions", {"model": "x", "prompt": "x", "api_token": token}),
            ("POST", "/v1/completions", {"prompt": "x", "api_token": [token]}),
            ("POST", "/v1/completions", {"prompt": "x", "api_token": token + "\n"}),
            ("POST", "/generate", {"inputs": "x", "parameters": {"adapter_id": "hf://a/b", "api_token": token}}),
            ("POST", "/generate", {"inputs": "x", "parameters": {"api_token": {"a": token}}}),
            ("POST", "/api/repos", {"name": "mine"}),
            ("POST", "/api/repos/mine/versions", {"source": "hf://a/b", "api_token": token}),
            ("POST", "/api/repos/mine/versions", {"source": 5, "api_token": token}),
            ("POST", "/api/repos/mine/versions", {"source": "hf://a/b", "api_token": [token]}),
            ("POST", "/api/keys", {"name": "a b"}),
        ):  # fmt: skip
            replies.append(guarded.send(method, path, who, **({} if body is None else {"json": body})))
    places = {"the log": guarded.log.getvalue()}
    places |= {f"reply {i}: {one.text[:200]}": one.text + str(one.headers) for i, one in enumerate(replies)}
    places["/metrics"] = guarded.send("GET", "/metrics", guarded.root).text
    places["audit"] = guarded.send("GET", "/api/audit?limit=1000", mine).text
    for secret in (mine.secret, wrong.secret, token):
        found = [place for place, text in places.items() if secret in text or quote(secret) in text]
        assert not found, found
    files = [path for path in guarded.home.rglob("*") if path.is_file()]
    assert any(path.name == "catalog.db" for path in files)
    held = [path for path in files for secret in (mine.secret, token) if secret.encode() in path.read_bytes()]
    assert not held, "the home keeps hashes"


def test_nobody_else_on_the_machine_reads_the_home(guarded: Guarded) -> None:
    assert guarded.home.stat().st_mode & 0o077 == 0
    assert Path(guarded.home / "catalog.db").exists()


def test_answers_hold_no_name_of_this_machine(guarded: Guarded) -> None:
    """Errors and listings speak of the product, not of folders of the server."""
    for path in (
        "/api/repos",
        f"/api/repos/{NAME}",
        "/v1/models",
        "/v1/adapters",
        "/api/info",
        "/health",
        "/api/serving",
    ):
        assert str(guarded.home) not in guarded.send("GET", path, guarded.user).text, path
