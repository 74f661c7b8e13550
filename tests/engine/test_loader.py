"""The loader's handle against a process that answers, dies or hangs on command."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from lorikeet.engine.loader import Loader
from lorikeet.engine.wire import LoaderSettings, Resolved
from lorikeet.model.spec import ModelSpec
from lorikeet.types import BaseIdentity

SCRIPT = """
import sys, time, zmq
from lorikeet.engine.wire import Compile, Resolved, decode_to_loader, encode
from lorikeet.types import ErrorInfo
socket = zmq.Context().socket(zmq.PAIR)
socket.connect(sys.argv[1])
while True:
    message = decode_to_loader(socket.recv())
    if isinstance(message, Compile):
        if message.folder == "hang":
            time.sleep(1000)
        if message.folder == "die":
            sys.exit(3)
        socket.send(encode(Resolved(message.job, error=ErrorInfo(code="x", message=message.folder, status=422))))
"""

SPEC = ModelSpec(
    family="llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1,
    head_dim=8, max_context=16,
)  # fmt: skip


@pytest.fixture
def loader(tmp_path: Path) -> Iterator[Loader]:
    script = tmp_path / "child.py"
    script.write_text(SCRIPT)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = Loader(context, tmp_path, [sys.executable, str(script)], job_seconds=1.0)
    base = BaseIdentity(name="b", sha256="0", tokenizer_sha256="0", stop_ids=(0,))
    made.configure(
        LoaderSettings(spec=SPEC, base=base, dtype="float32", cache=str(tmp_path), allow_lock_mismatch=False)
    )
    yield made
    made.stop()
    context.term()


def wait_for(loader: Loader, count: int) -> list[Resolved]:
    done: list[Resolved] = []
    deadline = time.monotonic() + 60
    while len(done) < count:
        assert time.monotonic() < deadline, done
        done += loader.poll()
        time.sleep(0.02)
    return done


@pytest.mark.parametrize(("folder", "said"), [("die", "died"), ("hang", "stopped after 1 s")])
def test_a_job_that_kills_or_hangs_the_process_fails_alone(loader: Loader, folder: str, said: str) -> None:
    first = loader.pid
    for job, name in enumerate(("one", folder, "two")):
        loader.submit(job, name)
    one, lost, two = wait_for(loader, 3)
    assert [one.job, lost.job, two.job] == [0, 1, 2]
    assert lost.error is not None and lost.error.status == 503 and said in lost.error.message
    assert one.error is not None and one.error.message == "one"
    assert two.error is not None and two.error.message == "two"
    assert loader.pid != first
