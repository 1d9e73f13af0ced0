"""Many handoffs between real processes while these are killed, stopped and corrupted, from one seed.

Two senders and two receivers; rounds of concurrent handoffs, each with trouble of its own, most rounds with trouble for
a whole process. What must hold, whatever happens:

- every handoff ends, at both living ends, within its budget and the stall limit;
- what landed is what was sent, to the last bit, and what did not land wrote nothing wrong;
- a handoff that no trouble touched lands;
- when a round is over nothing is held: no lease, no staging, no landing buffer, no quarantine;
- pages that were given back are not written again.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from baton.config_handoff import HandoffConfig
from baton.layout import KVLayout
from baton.messages import Ticket
from bench.ends import Ended, LandEnd, Push, SendEnd, Verdict
from bench.faulty import Fault, FaultyLink
from bench.remote import Died, Remote, RemoteError
from kvtransfer.handoff import Landed

LAYOUT = KVLayout("storm", layers=3, kv_heads=2, head_dim=32, dtype="float32")
STALL_S, LEASE_S = 1.0, 0.8
BUDGET_S = 6.0
SLACK_S = 3.0  # a machine that is busy with other things may be this late
LONG_STOP_S, SHORT_STOP_S = 1.6 * STALL_S, 0.3 * STALL_S
ROUND = 16  # handoffs at once
POOL_TOKENS = 8192

Harm = Literal[
    "none", "slow gather", "slow write", "sender aborts", "receiver releases", "gather fails", "write fails",
    "budget ends", "nobody begins", "link delays", "link stalls", "link cuts", "link flips",
]  # fmt: skip
HARMLESS: tuple[Harm, ...] = ("none", "slow gather", "slow write", "link delays")
# Blocks wait behind slow writes here, so that giving up meets some that are fetched and not yet written.
BACKLOGGED: tuple[Harm, ...] = ("slow write", "receiver releases", "sender aborts", "budget ends")
Strike = Literal["none", "kill", "stop briefly", "stop long", "stop, then kill", "close", "scribble"]


@dataclass(frozen=True, slots=True)
class Plan:
    """One handoff, and what is to go wrong with it."""

    request_id: str
    sender: int
    receiver: int
    tokens: int
    codec: str
    seed: int
    pushes: tuple[Push, ...] = field(repr=False)
    harm: Harm
    at_s: float
    fault: Fault | None

    @property
    def budget_s(self) -> float:
        return 0.4 if self.harm == "budget ends" else BUDGET_S


@dataclass(frozen=True, slots=True)
class Blow:
    """What is to happen to one process in a round."""

    strike: Strike
    role: Literal["sender", "receiver"]
    index: int
    at_s: float

    def hits(self, plan: Plan) -> bool:
        """A process that stops for less than the stall limit harms nobody."""
        mine = plan.sender if self.role == "sender" else plan.receiver
        return self.strike not in ("none", "stop briefly") and mine == self.index


@dataclass(slots=True)
class Report:
    """``wrong``: every promise that was broken; empty is what we want."""

    transport: str
    handoffs: int = 0
    rounds: int = 0
    landed: int = 0
    lost: int = 0
    by_harm: Counter[str] = field(default_factory=Counter)
    by_strike: Counter[str] = field(default_factory=Counter)
    replaced: int = 0  # processes
    longest_s: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def tree(self) -> dict[str, Any]:
        """Plain values, for JSON; ``asdict`` spoils counters."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in values.items()}


def plans(seed: int, transport: str, handoffs: int) -> Iterator[tuple[Blow, list[Plan]]]:
    """Rounds that depend on the seed only."""
    rng = random.Random(seed)
    for first in range(0, handoffs, ROUND):
        strike: Strike = rng.choices(
            ("none", "kill", "stop briefly", "stop long", "stop, then kill", "close", "scribble"),
            (4, 4, 2, 1, 1, 1, 3),
        )[0]
        blow = Blow(strike, rng.choice(("sender", "receiver")), rng.randrange(2), rng.uniform(0.0, 0.35))
        if strike == "scribble":
            blow = replace(blow, role="sender")
        yield blow, [_plan(rng, f"s{number}", transport) for number in range(first, min(first + ROUND, handoffs))]


def _plan(rng: random.Random, request_id: str, transport: str) -> Plan:
    harms = [harm for harm in Harm.__args__ if transport == "tcp" or harm not in ("link flips",)]  # type: ignore[attr-defined]
    harm: Harm = "none" if rng.random() < 0.4 else rng.choice(harms)
    tokens, chunk = rng.randint(1, 500), rng.choice((48, 128, 500))
    last_s = rng.choice((0.0, 0.05, 0.3))
    spans = [
        (layer, start, min(chunk, tokens - start))
        for start in range(0, tokens, chunk)
        for layer in range(LAYOUT.layers)
    ]
    pushes = tuple(Push(last_s * index / len(spans), *span) for index, span in enumerate(spans))
    fault = None
    if harm.startswith("link "):
        trouble = {"delays": "delay", "stalls": "stall", "cuts": "cut", "flips": "flip"}[harm.split()[1]]
        where = "data" if transport == "tcp" and (trouble == "flip" or rng.random() < 0.6) else "control"
        size = 2000 if where == "control" else 3 * tokens * LAYOUT.layer_token_bytes
        fault = Fault(trouble, where, rng.randrange(size // 2))  # type: ignore[arg-type]
    return Plan(
        request_id, rng.randrange(2), rng.randrange(2), tokens, rng.choice(("raw", "lossless", "int8", "int4")),
        rng.randrange(1 << 30), pushes, harm, rng.uniform(0.0, 0.3), fault,
    )  # fmt: skip


class Fleet:
    """Two senders and two receivers, replaced when they die. Use ``with``."""

    def __init__(self, config: HandoffConfig) -> None:
        self._config = config
        self._generation = 0
        self.senders = [self._begin(SendEnd, f"p{index}") for index in range(2)]
        self.receivers = [self._begin(LandEnd, f"d{index}") for index in range(2)]

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc: object) -> None:
        for remote in (*self.senders, *self.receivers):
            remote.end()

    def of(self, blow: Blow) -> Remote:
        return (self.senders if blow.role == "sender" else self.receivers)[blow.index]

    def replace(self, blow: Blow) -> None:
        """A new process of another generation, under the old worker's id."""
        self.of(blow).end()
        if blow.role == "sender":
            self.senders[blow.index] = self._begin(SendEnd, f"p{blow.index}")
        else:
            self.receivers[blow.index] = self._begin(LandEnd, f"d{blow.index}")

    def _begin(self, end: type[SendEnd] | type[LandEnd], worker_id: str) -> Remote:
        remote = Remote(end)
        self._generation += 1
        remote.call(
            "start", LAYOUT, self._config, worker_id=worker_id, generation=f"g{self._generation}", tokens=POOL_TOKENS
        )
        return remote


class Storm:
    def __init__(self, transport: str, seed: int, *, ucx_tls: str = "") -> None:
        """``transport``: tcp or nixl, over ``ucx_tls``."""
        self._transport, self._seed = transport, seed
        self._config = HandoffConfig(
            transport=transport, ucx_tls=ucx_tls, stall_s=STALL_S, lease_s=LEASE_S,  # type: ignore[arg-type]
            landing_bytes=24 << 20, staging_bytes=3 << 20,
        )  # fmt: skip
        self._report = Report(f"{transport} {ucx_tls}".strip())

    def run(self, handoffs: int) -> Report:
        report = self._report
        with Fleet(self._config) as fleet, ThreadPoolExecutor(ROUND) as pool:
            for blow, planned in plans(self._seed, self._transport, handoffs):
                report.rounds += 1
                report.by_strike[blow.strike] += 1
                running = [pool.submit(self._hand_over, fleet, plan, blow) for plan in planned]
                ended = self._strike(fleet, blow)
                for one in running:
                    one.result()
                if ended:
                    report.replaced += 1
                    fleet.replace(blow)
                self._settle(fleet)
        return report

    def _strike(self, fleet: Fleet, blow: Blow) -> bool:
        """Does what is planned to a process; True when there is one to replace."""
        remote = fleet.of(blow)
        time.sleep(blow.at_s)
        match blow.strike:
            case "none":
                return False
            case "kill":
                remote.signal(signal.SIGKILL)
                return True
            case "close":
                remote.call("close")
                return True
            case "scribble":
                for number in range(5):
                    remote.call("scribble", self._seed + number)
                    time.sleep(0.03)
                return False
        remote.signal(signal.SIGSTOP)
        time.sleep(SHORT_STOP_S if blow.strike == "stop briefly" else LONG_STOP_S)
        remote.signal(signal.SIGKILL if blow.strike == "stop, then kill" else signal.SIGCONT)
        return blow.strike == "stop, then kill"

    def _settle(self, fleet: Fleet) -> None:
        """Everything is free again, and free pages are as they were left."""
        deadline = time.monotonic() + 2 * STALL_S + SLACK_S
        held = self._held(fleet)
        while held and time.monotonic() < deadline:
            time.sleep(0.02)
            held = self._held(fleet)
        self._expect(not held, f"round {self._report.rounds}: still held: {held}")
        for remote in fleet.receivers:
            dirty = remote.call("dirty")
            self._expect(not dirty, f"round {self._report.rounds}: {dirty} rows written after their pages were freed")

    @staticmethod
    def _held(fleet: Fleet) -> str:
        found = []
        for remote in fleet.senders:
            sending = remote.call("stats")
            if sending.handoffs or sending.staging_bytes_used:
                found.append(str(sending))
        for remote in fleet.receivers:
            landing = remote.call("stats")
            if landing.leases or landing.landing_bytes_used or landing.quarantined_bytes:
                found.append(str(landing))
        return "; ".join(found)

    # ---- one handoff

    def _hand_over(self, fleet: Fleet, plan: Plan, blow: Blow) -> None:
        """Reserve, send, wait for both ends, look at every byte, free."""
        self._report.handoffs += 1
        self._report.by_harm[plan.harm] += 1
        send, land = fleet.senders[plan.sender], fleet.receivers[plan.receiver]
        begun_s = time.monotonic()
        with contextlib.ExitStack() as stack:
            try:
                ticket = self._reserve(land, plan)
            except (Died, RemoteError) as error:
                self._over(plan, blow, None, None, repr(error))
                return
            if plan.fault is not None:
                link = stack.enter_context(FaultyLink(ticket.host, ticket.port, plan.fault, plan.seed))
                ticket = replace(ticket, port=link.port)
            landing = land.start("ended", plan.request_id)
            sending = None if plan.harm == "nobody begins" else self._send(send, land, plan, ticket)
            landed = self._in_time(landing, plan, begun_s, "receiver")
            self._report.longest_s = max(self._report.longest_s, time.monotonic() - begun_s)
            told = None if sending is None else self._in_time(sending, plan, begun_s, "sender")
            self._check(land, plan, landed)
            self._over(plan, blow, landed, told, "")
            self._free(send, land, plan)

    @staticmethod
    def _reserve(land: Remote, plan: Plan) -> Ticket:
        ticket: Ticket = land.call(
            "reserve", plan.request_id, 1, tokens=plan.tokens, codec=plan.codec, budget_s=plan.budget_s,
            slow_s=0.005 if plan.harm in BACKLOGGED else 0.0,
            break_layer=plan.seed % LAYOUT.layers if plan.harm == "write fails" else -1,
        )  # fmt: skip
        return ticket

    @staticmethod
    def _send(send: Remote, land: Remote, plan: Plan, ticket: Ticket) -> Future[Any]:
        """The sender's outcome, later."""
        send.start("put", plan.request_id, plan.tokens, plan.seed)
        offer = send.start(
            "offer", ticket, plan.request_id, plan.pushes, tokens=plan.tokens, budget_s=plan.budget_s,
            first=plan.seed, finish=plan.harm != "budget ends",
            slow_s=0.005 if plan.harm == "slow gather" else 0.0,
            break_layer=plan.seed % LAYOUT.layers if plan.harm == "gather fails" else -1,
        )  # fmt: skip
        if plan.harm in ("sender aborts", "receiver releases"):
            time.sleep(plan.at_s)
            if plan.harm == "sender aborts":
                send.start("abort", plan.request_id)
            else:
                land.start("release", plan.request_id)
        with contextlib.suppress(Died, RemoteError):
            offer.result(BUDGET_S + SLACK_S)
        return send.start("ended", plan.request_id)

    def _in_time(self, answer: Future[Any], plan: Plan, begun_s: float, who: str) -> Ended | None:
        """How one end saw it end; None when its process died."""
        left_s = begun_s + plan.budget_s + LONG_STOP_S + STALL_S + SLACK_S - time.monotonic()
        try:
            ended: Ended = answer.result(max(0.0, left_s))
        except TimeoutError:
            self._expect(False, f"{plan}: the {who} hangs")
            return None
        except Died:
            return None
        except RemoteError as error:
            self._expect(False, f"{plan}: {who}: {error}")
            return None
        return ended

    def _check(self, land: Remote, plan: Plan, landed: Ended | None) -> None:
        """Every byte of the request's pages, before and after the lease is given up."""
        if landed is None:
            return
        with contextlib.suppress(Died):
            before = self._verdict(land, plan)
            try:
                land.call("release", plan.request_id, timeout_s=LONG_STOP_S + STALL_S + SLACK_S)
            except TimeoutError:
                self._expect(False, f"{plan}: its release hangs")
            after = self._verdict(land, plan)
            self._expect(not after.wrong, f"{plan}: {after.wrong} wrong rows")
            if isinstance(landed.outcome, Landed):
                whole = before == after == Verdict(plan.tokens * LAYOUT.layers, 0, 0)
                self._expect(whole, f"{plan}: landed with {before}, then {after}")
                self._expect(landed.outcome.first.token == plan.seed, f"{plan}: another first token")

    @staticmethod
    def _verdict(land: Remote, plan: Plan) -> Verdict:
        verdict: Verdict = land.call(
            "verdict", plan.request_id, plan.tokens, plan.seed, plan.codec, plan.pushes, timeout_s=30.0
        )
        return verdict

    @staticmethod
    def _free(send: Remote, land: Remote, plan: Plan) -> None:
        with contextlib.suppress(Died):
            land.call("free", plan.request_id)
        if plan.harm != "nobody begins":
            with contextlib.suppress(Died, RemoteError):
                send.call("drop", plan.request_id)

    def _over(self, plan: Plan, blow: Blow, landed: Ended | None, told: Ended | None, error: str) -> None:
        """Counts the end, and checks it against what was to go wrong."""
        good = landed is not None and isinstance(landed.outcome, Landed)
        if good:
            self._report.landed += 1
        else:
            self._report.lost += 1
            reason = error or (getattr(landed.outcome, "reason", "?") if landed is not None else "the receiver died")
            self._report.reasons["".join(part for part in reason if not part.isdigit())] += 1
            touched = blow.hits(plan) or plan.harm not in HARMLESS
            self._expect(touched, f"{plan}: lost although nothing happened to it: {reason}")
        if told is not None and isinstance(told.outcome, Landed) and landed is not None:
            self._expect(good, f"{plan}: the sender believes that it landed, the receiver {landed.outcome}")

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self._report.wrong.append(otherwise)


def summary(report: Report) -> Sequence[str]:
    return (
        f"{report.transport}: {report.handoffs} handoffs, {report.landed} landed, {report.lost} lost, "
        f"{report.replaced} processes replaced, longest {report.longest_s:.2f} s, {len(report.wrong)} broken promises",
        *report.wrong,
    )
