"""benchmarks/serving.py: its arithmetic, its clocks, its files, and whole runs on a tiny shape."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peers
import serving
import shapes
from http_load import HttpClients
from load import CASES, Trace, choose_adapters, compare, interval, make_clients, summarise
from lorikeet.model.families import load_spec
from lorikeet.model.tokenizer import Tokenizer
from roofline import Itemsizes, Machine, decode_work, prefill_work, rank_size

BF16 = Itemsizes(2, 2)
SCRIPT = Path(serving.__file__)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


def spec_of(name: str, folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps(shapes.SHAPES[name].config()))
    return load_spec(folder)


# --- arithmetic ---------------------------------------------------------------------------------------------------


def test_shapes_have_the_sizes_that_peers_were_measured_at(tmp_path: Path) -> None:
    assert shapes.parameters(spec_of("small", tmp_path)) == pytest.approx(124.6e6, rel=1e-3)
    half = spec_of("half", tmp_path)
    assert shapes.parameters(half) == pytest.approx(386.5e6, rel=1e-3)
    assert 32 * 16 * rank_size(half) * 2 == pytest.approx(563e6, rel=1e-3)
    one = decode_work(half, BF16, rows=1, context=0, distinct=0, adapted=0, rank=16)
    assert (one.bytes, one.operations) == (pytest.approx(773e6, rel=1e-3), pytest.approx(773e6, rel=1e-3))
    all_different = decode_work(half, BF16, rows=32, context=160, distinct=32, adapted=32, rank=16)
    base = decode_work(half, BF16, rows=32, context=160, distinct=0, adapted=0, rank=16)
    assert all_different.bytes - base.bytes == pytest.approx(563e6, rel=1e-3)
    assert base.bytes - 773e6 == pytest.approx(32 * 160 * 2 * 24 * 128 * 2, rel=0.01)
    int8 = decode_work(half, Itemsizes(1, 2), rows=1, context=0, distinct=0, adapted=0, rank=16)
    assert one.bytes - int8.bytes == pytest.approx(357.8e6, rel=1e-3)
    prompts = prefill_work(half, BF16, rows=32, prompt=128, distinct=0, adapted=0, rank=16)
    assert prompts.operations == pytest.approx(2 * 32 * 128 * 357.8e6, rel=0.01)


def test_a_limit_is_the_slower_of_reading_and_computing(tmp_path: Path) -> None:
    machine = Machine(40e9, {1: 15e9, 32: 300e9, 512: 400e9})
    half = spec_of("half", tmp_path)
    alone = decode_work(half, BF16, rows=1, context=0, distinct=0, adapted=0, rank=16)
    assert machine.seconds(alone, 1) == pytest.approx(alone.bytes / 40e9)
    many = decode_work(half, BF16, rows=32, context=0, distinct=0, adapted=0, rank=16)
    assert machine.seconds(many, 32) == pytest.approx(many.operations / 300e9)
    assert machine.seconds(many, 4096) == pytest.approx(many.operations / 400e9)


def test_cases() -> None:
    draw = np.random.default_rng(0)
    by_case = {case: choose_adapters(case, 32, 2, 32, draw) for case in CASES}
    assert (by_case["base"] == -1).all() and (by_case["one"] == 0).all()
    assert all(sorted(wave) == list(range(32)) for wave in by_case["all"].tolist())
    assert ((by_case["mixed"] < 0).sum(1) == 16).all()
    counts = np.bincount(choose_adapters("zipf", 1000, 10, 32, draw).ravel(), minlength=32)
    assert counts[0] / counts[3] == pytest.approx(4, rel=0.15)
    clients = make_clients("all", 8, 3, 4, 16, 512, draw)
    prompts = [tuple(ask.prompt) for asks in clients for ask in asks]
    assert len(set(prompts)) == 24 and {len(prompt) for prompt in prompts} == {16}
    assert [asks[0].adapter for asks in clients] == [0, 1, 2, 3] * 2


def test_rates_and_latencies_of_known_traces() -> None:
    early, late = Trace(0.0, [1.0, 2.0, 3.0, 4.0], 4), Trace(0.0, [2.0, 3.0, 4.0, 6.0], 4)
    said = summarise([[early], [late]], prompt=10)
    assert said["tokens_per_second"] == pytest.approx(8 / 6)
    assert said["prefill_tokens_per_second"] == pytest.approx(20 / 2)
    assert said["decode_tokens_per_second"] == pytest.approx(4 / 2)  # from 2 to 4 both are at work
    assert (said["ttft_p50"], said["itl_p50"]) == (1.5, 1.0)
    assert said["itl_p99"] == pytest.approx(np.percentile([1, 1, 1, 1, 1, 2], 99))


def test_bars_and_intervals() -> None:
    low, high = interval([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8])
    assert 1.0 <= low < 1.4 < high <= 1.8
    found = compare("a / b", [2.0] * 9, [1.0] * 9, 1.9, side="offline", clients=8)
    assert (found["median"], found["ci"], found["holds"], found["pairs"]) == (2.0, [2.0, 2.0], True, 9)
    assert compare("a / b", [2.0] * 9, [1.0] * 9, 1.9, at_most=True)["holds"] is False
    assert compare("a / b", [2.0, 1.0, 2.0], [1.0] * 3, 1.5)["holds"] is False
    assert compare("a / b", [2.0], [1.0])["holds"] is None


# --- files --------------------------------------------------------------------------------------------------------


def test_files_are_made_once_and_every_token_that_is_generated_shows(cache: Path) -> None:
    from transformers import AutoTokenizer

    made = shapes.fixture("tiny", cache)
    before = (made.base / "model.safetensors").stat().st_mtime_ns
    folders = made.adapters([16, 16, 4])
    assert [folder.parent.name for folder in folders] == ["rank-16", "rank-16", "rank-4"]
    assert shapes.fixture("tiny", cache).base == made.base
    assert (made.base / "model.safetensors").stat().st_mtime_ns == before
    tokenizer = Tokenizer(made.base)
    assert tokenizer.vocab_size == made.spec.vocab_size
    texts = [tokenizer.decode([token]) for token in range(257, tokenizer.vocab_size)]
    assert all(text.isalpha() for text in texts) and len(set(texts)) == len(texts)
    theirs = AutoTokenizer.from_pretrained(made.base)
    text = "ab, Zx! \u00e9"
    assert theirs.encode(text) == tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text


# --- clocks of the clients ----------------------------------------------------------------------------------------


@contextmanager
def scripted_server(lines: list[str], status: int = 200) -> Iterator[str]:
    """Every completion is these lines; a second request on a connection is not answered."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        answered = False

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            if self.answered:
                self.close_connection = True
                return
            self.answered = True
            self.send_response(status)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for data in [*(f"data: {line}\n\n" for line in lines), ""]:
                self.wfile.write(f"{len(data):x}\r\n{data}\r\n".encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def chunk(text: str) -> str:
    return json.dumps({"choices": [{"text": text}], "usage": None})


USAGE = json.dumps({"choices": [], "usage": {"completion_tokens": 4}})


def played(lines: list[str], new: int, status: int = 200) -> dict[str, Any]:
    with scripted_server(lines, status) as url:
        clients = HttpClients(url)
        try:
            return clients.run([[([1, 2], {})], [([3, 4], {})]], new)
        finally:
            clients.close()


def test_streams_are_counted_by_the_servers_account() -> None:
    said = played([chunk("ab"), chunk(""), chunk("c"), chunk("d"), USAGE, "[DONE]"], new=4)
    assert said["tokens"] == 8 and said["ttft_p50"] > 0
    assert played([chunk("a"), chunk("b"), "[DONE]"], new=2)["tokens"] == 4


def test_each_request_has_a_connection_of_its_own() -> None:
    with scripted_server([chunk("a"), chunk("b"), "[DONE]"]) as url:
        clients = HttpClients(url)
        try:
            assert clients.run([[([1, 2], {}), ([3, 4], {})]], 2)["tokens"] == 4
            assert clients.run([[([5, 6], {})]], 2)["tokens"] == 2
        finally:
            clients.close()


@pytest.mark.parametrize(
    ("lines", "status", "message"),
    [
        ([chunk("a"), "[DONE]"], 200, "expected 4 tokens, found 1"),
        ([json.dumps({"error": {"message": "gone"}})], 200, "gone"),
        (["no such model"], 404, "404: data: no such model"),
    ],
)
def test_answers_that_are_not_what_was_asked_for_end_the_run(lines: list[str], status: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        played(lines, 4, status)


def test_fields_of_a_url_peer() -> None:
    assert peers.fields("llama") == {"model": "llama"}
    assert peers.fields('{"lora": [{"id": 3, "scale": 1}]}') == {"lora": [{"id": 3, "scale": 1}]}
    with pytest.raises(SystemExit, match="no JSON object"):
        peers.fields('{"lora": ')


# --- whole runs ---------------------------------------------------------------------------------------------------


def run(cache: Path, options: str) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), "--shape", "tiny", "--cache", str(cache), "--set", "threads=1"]
    ended = subprocess.run([*command, *options.split()], capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr[-3000:]
    said: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    assert said["benchmark"] == "serving" and not list(cache.glob("run-*"))
    tiny: dict[str, Any] = said["shapes"]["tiny"]
    return tiny


def test_a_run_reports_every_cell_ratio_and_limit(cache: Path) -> None:
    small = "--batch 1 3 --case base all --repeats 1 --rounds 2 --adapters 3 --rank 4 --prompt 8 --new 6"
    said = run(cache, small + " --peer peft")
    cells = {(cell["side"], cell["case"], cell["clients"]): cell for cell in said["cells"]}
    wanted = [("base", 1), ("base", 3), ("all", 3)]
    assert set(cells) == {(side, *one) for side in ("offline", "http", "peft") for one in wanted}
    for (_, case, clients), cell in cells.items():
        assert cell["tokens_per_second"] > 0 and cell["ttft_p95"] >= cell["ttft_p50"] > 0
        assert cell["itl_p99"] >= cell["itl_p95"] >= cell["itl_p50"] >= 0 and cell["rss"] > 1e7
        assert (cell["distinct"], cell["adapted"]) == ((clients, clients) if case == "all" else (0, 0))
        limit = cell["limit"]
        assert limit["tokens_per_second"] > 0 and limit["decode_gb"] > 0 and limit["prefill_gflop"] > 0
        assert cell["reached"]["prefill"] > 0 and cell["reached"]["whole_of_peak"] > 0
    named = {(one["side"], one["ratio"], one["clients"]) for one in said["ratios"]}
    assert {("offline", "all / base", 3), ("http", "all / base", 3), ("offline", "offline / peft, all", 3)} <= named
    assert ("offline", "decode / limit", 1) in named and ("http", "prefill / limit", 3) in named
    assert said["machine"]["bandwidth"] > 0 and set(said["machine"]["rates"]) == {"1", "3", "32", "512"}
    assert set(said["cold"]) == {"offline", "http", "peft"}
    assert all(one["cold_seconds"] > 0 for one in said["cold"].values())


@pytest.mark.slow
def test_questions(cache: Path) -> None:
    small = "--batch 8 --repeats 2 --adapters 8 --rank 4 --prompt 8 --new 6"
    questions = run(cache, small + " --question distinct mixed-ranks interference memory")["questions"]
    assert set(questions["distinct"]["step_seconds"]) == {"1", "2", "4", "8"}
    assert set(questions["mixed-ranks"]["step_seconds"]) == {"mixed x8", "equal x8"}
    assert questions["interference"]["quiet_p99"] > 0 and questions["interference"]["last_first_token"] > 0
    assert questions["memory"]["adapted"]["rss"] > questions["memory"]["weights"] > 0
    assert all(one["pairs"] == 2 for answer in questions.values() for one in answer.get("ratios", []))


def test_what_makes_no_sense_is_said_at_once(cache: Path) -> None:
    def refused(*options: str) -> str:
        command = [sys.executable, str(SCRIPT), "--shape", "tiny", "--cache", str(cache), *options]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert ended.returncode != 0 and "Traceback" not in ended.stderr
        return ended.stderr

    assert "--set: found 'step_token=3'; expected NAME=VALUE" in refused("--set", "step_token=3")
    assert "--new: found 1; expected 2 or more" in refused("--new", "1")
