"""Tickets of copies on a stream, with a stream that is told when it is done."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from lorikeet.engine.copies import StreamCopier


class Event:
    """Of the n-th copy; `Stream.done` says how many the device has carried out."""

    made: list[Event] = []
    done = 0

    def __init__(self) -> None:
        Event.made.append(self)
        self.number = len(Event.made)

    def record(self, stream: Any) -> None:
        pass

    def query(self) -> bool:
        return self.number <= Event.done

    def synchronize(self) -> None:
        Event.done = max(Event.done, self.number)


class Stream:
    def __init__(self, device: Any = None) -> None:
        self.waited: list[Any] = []

    def wait_event(self, event: Event) -> None:
        self.waited.append(event.number)

    def wait_stream(self, other: Any) -> None:
        self.waited.append(other)


def test_a_ticket_is_the_event_of_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    computing = Stream()
    monkeypatch.setattr(Event, "made", [])
    monkeypatch.setattr(Event, "done", 0)
    for name, fake in (("Event", Event), ("Stream", Stream), ("stream", lambda stream: nullcontext())):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    copier, source = StreamCopier("cpu"), torch.arange(4, dtype=torch.uint8)
    copier.follow()
    assert copier._stream.waited == [computing]
    assert [copier.copy(source, torch.zeros(4, dtype=torch.uint8)) for _ in range(3)] == [1, 2, 3]
    assert not copier.done(1)
    copier.wait(2)
    assert computing.waited == [2]
    Event.done = 2
    assert copier.done(2) and copier.done(1) and not copier.done(3)
    assert copier.copy(source, torch.zeros(4, dtype=torch.uint8)) == 4
    copier.wait(1)  # long done: nobody need wait
    copier.wait(4)
    assert computing.waited == [2, 4]
    copier.finish(3)
    assert Event.done == 3 and copier.done(3) and not copier.done(4)
    copier.finish(2)
    copier.finish(4)
    assert copier.done(4) and not copier._events
