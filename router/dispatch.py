"""One request's way through the workers: reserve, prefill, hand over, decode; every way out frees everything.

    choose decode ─► Reserve ─► Ticket ─► choose prefill ─► Prefill(ticket) ─► first token ─► tokens from decode

Where the decode worker computes the prompt itself: ``Decode``. When a worker or a handoff is lost on the way, the
request is tried again on others, from the tokens that the client has (ADR 18): ``router.recovery`` says whether.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from baton.errors import BatonError, ProtocolError, Unavailable, from_code
from baton.messages import HANDOFF_LOST, Decode, Failed, Granted, Handed, Prefill, Report, Reserve, Ticket, Tokens
from baton.request import TokenEvent
from router.choice import Choice
from router.peers import Peer
from router.recovery import Patience, Retries
from router.run import Attempt, Run

log = logging.getLogger(__name__)


class Dispatcher:
    """Runs requests over the connected workers. ``retried`` is told the reason of every failure that is tried again."""

    def __init__(
        self, choice: Choice, patience: Patience, *, retried: Callable[[str], None] = lambda reason: None
    ) -> None:
        self._choice, self._patience, self._retried = choice, patience, retried

    async def stream(self, run: Run) -> AsyncGenerator[tuple[TokenEvent, ...]]:
        """Every output token, in order, in batches as they come. Closing the iterator frees the request everywhere."""
        retries, exclude = Retries(self._patience, run.deadline_s), frozenset[str]()
        while True:
            attempt = run.attempt()
            try:
                async with aclosing(self._attempt(attempt, run, exclude)) as batches:
                    async for batch in batches:
                        run.took(attempt, batch)
                        yield batch
                return
            except BatonError as error:
                pause_s = retries.after(error, progress=attempt.progressed, now_s=time.monotonic())
                log.warning("request %s: %s; tried again after %d tokens", run.work.request_id, error, len(run.sent))
                self._retried(attempt.blame(error))
            finally:
                run.ended(attempt)
            run.lost(attempt, pause_s)
            exclude = _excluded(exclude, attempt)
            await asyncio.sleep(pause_s)

    async def _attempt(
        self, attempt: Attempt, run: Run, exclude: frozenset[str]
    ) -> AsyncGenerator[tuple[TokenEvent, ...]]:
        work = attempt.work
        with contextlib.ExitStack() as held:
            held.enter_context(attempt.timed())
            decode = self._choice.decode(work, exclude)
            local = self._choice.local(work, decode, exclude)
            held.enter_context(attempt.at(decode, computes=self._choice.assigned(work, decode) if local else 0))
            if local:
                _send(attempt, decode, Decode(attempt.remaining()))
            else:
                _send(attempt, decode, Reserve(attempt.remaining(), attempt.epoch, codec=run.codec, floor=run.floor))
                ticket = await _granted(attempt)
                prefill = self._choice.prefill(work, exclude)
                held.enter_context(attempt.at(prefill, computes=self._choice.assigned(work, prefill)))
                _send(attempt, prefill, Prefill(attempt.remaining(), ticket))
                attempt.transport = ticket.transport
            attempt.dispatched_s = time.monotonic()
            async with aclosing(_tokens(attempt)) as batches:
                async for batch in batches:
                    yield batch


def _excluded(before: frozenset[str], attempt: Attempt) -> frozenset[str]:
    """Whom the next attempt leaves out, while there are others: who failed, and the second time whoever took part."""
    if attempt.progressed:
        return attempt.failed
    return before | (attempt.peers.keys() if before else attempt.failed)


async def _granted(attempt: Attempt) -> Ticket:
    match await attempt.next():
        case _, Granted(ticket=ticket):
            return ticket
        case peer, Failed() as failed:
            raise _error(attempt, peer, failed)
        case peer, other:
            raise ProtocolError(f"{type(other).__name__} from {peer.address.role} before the ticket")


async def _tokens(attempt: Attempt) -> AsyncGenerator[tuple[TokenEvent, ...]]:
    """Both workers' tokens in order, until the last."""
    while not attempt.finished:
        match await attempt.next():
            case peer, Tokens(events=events):
                if batch := attempt.arrived(peer.address.role, events):
                    yield batch
            case peer, Report() as report:
                attempt.account(peer, report)
            case peer, Failed() as failed:
                # After the first token prefill's part is over; whether the handoff worked is decode's to say.
                if peer.address.role == "decode" or not attempt.fruitful:
                    raise _error(attempt, peer, failed)
            case _, Handed():
                pass
            case peer, other:
                raise ProtocolError(f"unexpected {type(other).__name__} from {peer.address.role}")


def _send(attempt: Attempt, peer: Peer, record: object) -> None:
    try:
        peer.send(record)
    except Unavailable:
        attempt.failed |= {peer.address.worker_id}
        raise


def _error(attempt: Attempt, peer: Peer, failed: Failed) -> BatonError:
    attempt.failed |= {peer.address.worker_id}
    if failed.code == Unavailable.code:  # whose fault a lost handoff is cannot be told here: both are remembered
        for suspect in attempt.peers.values() if failed.reason == HANDOFF_LOST else (peer,):
            suspect.suspicion.strike(time.monotonic())
    return from_code(
        failed.code, failed.message, field=failed.field, retry_after_ms=failed.retry_after_ms, reason=failed.reason
    )
