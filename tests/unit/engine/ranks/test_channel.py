"""Records between two processes: whole or not at all, in any length, with an end that both see."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from baton.errors import ProtocolError
from engine import channel
from engine.attention import Span
from engine.channel import MESSAGE_BYTES, Channel, Ready
from engine.runner import Step


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with Channel(ours, peer="rank 1") as first, Channel(theirs, peer="rank 0") as second:
        yield first, second


@pytest.mark.parametrize("tokens", [0, 1, 5, 40_000, 200_000])
def test_a_step_of_any_length_arrives_as_it_was_sent(ends: tuple[Channel, Channel], tokens: int) -> None:
    step = Step(tuple(range(tokens)), (0, tokens), (Span(0, 1, (3, 4)), Span(7, tokens, ())), 1)
    sender = threading.Thread(target=ends[0].send, args=(step,))  # longer ones exceed what the socket holds
    sender.start()
    assert ends[1].receive(5.0) == step
    sender.join(5.0)


def test_nothing_comes_and_the_end(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(TimeoutError):
        ends[1].receive(0.05)
    ends[0].send(Ready(1))
    ends[0].close()
    assert ends[1].receive(1.0) == Ready(1)
    assert ends[1].receive(1.0) is None
    with pytest.raises(OSError, match="Broken pipe"):
        ends[1].send(Ready(1))


def test_who_takes_nothing_is_not_waited_for_forever(
    ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "SEND_TIMEOUT_S", 0.1)
    with pytest.raises(TimeoutError):
        ends[0].send_packed(b"x" * (64 * MESSAGE_BYTES))


def test_endless_records_are_refused(ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MAX_RECORD_BYTES", MESSAGE_BYTES)
    sender = threading.Thread(target=ends[0].send_packed, args=(b"x" * (2 * MESSAGE_BYTES),))
    sender.start()
    with pytest.raises(ProtocolError, match="rank 0 sent more than"):
        ends[1].receive(1.0)
    sender.join(5.0)


def test_the_end_is_seen_although_a_copy_of_the_descriptor_lives_on(ends: tuple[Channel, Channel]) -> None:
    """As in a process that was forked while the channel was open."""
    copy = os.dup(ends[0].fileno())
    try:
        ends[0].close()
        ends[0].close()
        assert ends[1].receive(1.0) is None
    finally:
        os.close(copy)
