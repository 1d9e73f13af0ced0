"""The cluster under simulated time: router, prefill and decode workers, and the links between them.

    arrive ─► line ─► choose decode ─► line for pages ─► reserve ─► choose prefill ─► prefill ─► first token
           ─► handoff over both links ─► landed ─► decode in the batch ─► last token

What runs is the real code: :class:`engine.scheduler.Scheduler` and :class:`engine.pace.Pace` in every worker,
:mod:`router.admission` in front, :mod:`router.strategies` and :mod:`router.policy` on views of pushed loads and cache
events as old as the real ones. What is modelled: the accelerator and the handoff (a cost model), the line in front of a
decode worker's pages (``decode_worker.admission``, which waits on an event loop), and the links: a handoff holds its
sender's and its receiver's link for its whole transfer time, first come first served, and may begin before prefill ends
by as much as the cost model says is hidden. Prefix caches are the real ones too where the workload knows which prompts
begin alike; they hold prompts only, since no trace says what was answered. Not modelled: landing-buffer limits. There
is no randomness here: the workload brings it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import assert_never

from baton.errors import InvalidRequest, Overloaded
from engine.sequence import Job
from placement.cluster import Change, Cluster, Pool
from placement.entry import Entry
from placement.events import Rank, Timeline
from placement.host import Host
from placement.outcome import End, Outcome, Slo, Trip
from placement.replica import Replica
from placement.router_view import Role, RouterView
from placement.workload import Arrival, page_keys
from router.policy import WorkerView


def simulate(
    cluster: Cluster,
    arrivals: Sequence[Arrival],
    *,
    changes: Iterable[Change] = (),
    block_tokens: int = 0,
    decide: Slo | None = None,
    fast: bool = True,
) -> Outcome:
    """Runs ``arrivals`` through ``cluster`` to the end of the last request.

    block_tokens: tokens of each of the arrivals' blocks, by which workers cache prefixes; 0: they cache nothing.
    With ``decide`` it stops as soon as it is certain whether this SLO's attainment is reached.
    ``fast=False`` takes every decode step through the scheduler: the same results, slower.
    """
    return _Simulation(cluster, arrivals, block_tokens, fast).run(changes, decide)


@dataclass(slots=True)
class _Flight:
    """One attempt of one request. ``before``: output tokens that earlier attempts delivered."""

    index: int  # of the request
    trip: Trip
    before: int
    decode: Replica
    dispatched_s: float
    local: bool = False  # the decode worker computes the prompt itself
    prefill: Replica | None = None
    landed: bool = False
    request_id: str = field(init=False)

    def __post_init__(self) -> None:
        self.request_id = f"{self.index}/{self.trip.attempts}"

    @property
    def prompt_tokens(self) -> int:
        return self.trip.prompt_tokens + self.before

    def job(self, *, prefill_only: bool = False, keys: tuple[int, ...] = ()) -> Job:
        left = self.trip.output_tokens - self.before
        return Job(self.request_id, self.prompt_tokens, left, prefill_only=prefill_only, keys=keys)


class _Simulation:
    def __init__(self, cluster: Cluster, arrivals: Sequence[Arrival], block_tokens: int, fast: bool) -> None:
        self._cluster, self._arrivals, self._fast = cluster, arrivals, fast
        self._block_tokens = block_tokens
        self._timeline = Timeline()
        self._host = Host(cluster.machine, self._timeline)
        self._made: list[Replica] = []
        self._pools: dict[Role, list[Replica]] = {"decode": self._workers("decode", cluster.decode)}
        if cluster.prefill is not None:
            self._pools["prefill"] = self._workers("prefill", cluster.prefill)
        self._staying: dict[Role, list[Replica]] = {}  # of the pools, who takes requests; anew after each change
        self._lines: dict[str, deque[_Flight]] = {}
        self._router = RouterView(self._timeline, cluster.strategy, cluster.affinity_factor)
        self._trips = [Trip(a.at_s, a.prompt_tokens, a.output_tokens) for a in arrivals]
        self._flights: dict[str, _Flight] = {}
        self._entry = Entry(cluster.admission, self._timeline, self) if cluster.admission else None
        self._inflight = 0
        self._slo: Slo | None = None
        self._missed = self._met = 0

    def run(self, changes: Iterable[Change], decide: Slo | None) -> Outcome:
        self._slo = decide
        wanted = len(self._trips) * decide.attainment - 1e-9 if decide else float("inf")
        allowed = len(self._trips) - wanted if decide else float("inf")
        for change in changes:
            self._timeline.at(change.at_s, Rank.CHANGE, partial(self._change, change))
        self._expect_arrival(0)
        while self._missed <= allowed and self._met < wanted and self._timeline.step():
            pass
        uses = {worker.name: worker.use() for worker in self._made}
        return Outcome(self._trips, self._timeline.now_s, uses, gave_up=self._missed > allowed)

    # ---- a request's way

    def _expect_arrival(self, index: int) -> None:
        if index < len(self._trips):
            self._timeline.at(self._trips[index].arrived_s, Rank.NEWS, partial(self._arrive, index))

    def _arrive(self, index: int) -> None:
        self._expect_arrival(index + 1)
        trip = self._trips[index]
        self._inflight += 1
        if self._inflight > self._cluster.max_inflight:
            self._end(index, End.REFUSED)
        elif self._entry is None:
            self._dispatch(index)
        else:
            role: Role = "prefill" if self._cluster.prefill else "decode"
            uncached = self._router.uncached(role, self._able(role), trip.prompt_tokens, self._keys(index, role))
            self._entry.offer(index, uncached_tokens=uncached)

    def seen(self) -> tuple[Sequence[WorkerView], Sequence[WorkerView]]:
        prefills = self._router.views("prefill", self._able("prefill"), self._lines) if self._cluster.prefill else ()
        return prefills, self._router.views("decode", self._able("decode"), self._lines)

    def admitted(self, number: int) -> None:
        self._dispatch(number)

    def refused(self, number: int) -> None:
        self._end(number, End.REFUSED)

    def _dispatch(self, index: int) -> None:
        """One attempt: a decode worker first, then its pages, then a prefill worker; or the decode worker alone."""
        trip = self._trips[index]
        tokens, keys = trip.prompt_tokens + trip.sent, self._keys(index, "decode")
        decode = self._choose_decode(tokens, keys, index)
        trip.attempts += 1
        if decode is None or trip.attempts > self._cluster.attempts:
            self._end(index, End.LOST)
            return
        flight = _Flight(index, trip, trip.sent, decode, self._timeline.now_s)
        flight.local = self._is_local(decode, tokens, index)
        self._flights[flight.request_id] = flight
        if not self._cluster.paired:
            self._router.sent("decode", decode, tokens, keys, computes=flight.local)
        try:
            if flight.local:
                decode.add(flight.job(keys=keys))
            else:
                self._queue_for_pages(flight)
        except (Overloaded, InvalidRequest):
            self._drop(flight, End.REFUSED)

    def _is_local(self, decode: Replica, tokens: int, index: int) -> bool:
        if self._cluster.prefill is None or not self._cluster.local_prefill:
            return self._cluster.prefill is None
        keys: dict[Role, tuple[int, ...]] = {
            "prefill": self._keys(index, "prefill"),
            "decode": self._keys(index, "decode"),
        }
        return self._router.prefers_local(decode, self._able("prefill"), tokens, keys, self._lines)

    def _queue_for_pages(self, flight: _Flight) -> None:
        line = self._lines.setdefault(flight.decode.name, deque())
        if len(line) >= flight.decode.limits.max_waiting:
            raise Overloaded("the line for pages is full")
        line.append(flight)
        if len(line) == 1:
            at_s = self._timeline.now_s if self._cluster.paired else flight.decode.next_call_s
            self._timeline.at(at_s, Rank.NEWS, partial(self.freed, flight.decode))

    def freed(self, replica: Replica) -> None:
        """Whoever is first in the line for this worker's pages tries again."""
        line = self._lines.get(replica.name)
        while line:
            flight = line[0]
            try:
                replica.reserve(flight.job(keys=self._keys(flight.index, "decode")))
            except Overloaded:
                return
            except InvalidRequest:
                line.popleft()
                self._drop(flight, End.REFUSED)
                continue
            line.popleft()
            self._prefill(flight)

    def _prefill(self, flight: _Flight) -> None:
        keys = self._keys(flight.index, "prefill")
        prefill = self._choose_prefill(flight.prompt_tokens, keys, flight.index)
        try:
            if prefill is None:
                raise Overloaded("no prefill worker")
            if not self._cluster.paired:
                self._router.sent("prefill", prefill, flight.prompt_tokens, keys, computes=True)
            prefill.add(flight.job(prefill_only=True, keys=keys))
        except (Overloaded, InvalidRequest):
            self._drop(flight, End.REFUSED)
            self._unreserve(flight)
            return
        flight.prefill = prefill

    def _keys(self, index: int, role: Role) -> tuple[int, ...]:
        """Names of a role's pages of a request's prompt. Tokens that an earlier attempt sent have none, as in the
        trace."""
        if not self._block_tokens:
            return ()
        return page_keys(self._arrivals[index], self._block_tokens, self._spec(role).limits.page_tokens)

    def prefilled(self, replica: Replica, request_id: str, now_s: float) -> None:
        """The first token is out; the KV goes to the decode worker as soon as both links are free."""
        started_s = replica.scheduler.timing(request_id).scheduled_s
        replica.release(request_id)
        flight = self._flights.get(request_id)
        if flight is None:
            return
        trip = flight.trip
        trip.queue_s += (started_s or now_s) - flight.dispatched_s
        self._first(flight, now_s)
        if trip.sent >= trip.output_tokens:
            self._unreserve(flight)
            self._finish(flight, now_s)
            return
        tokens, cost = flight.prompt_tokens, replica.cost
        whole_s, exposed_s = cost.transfer_s(tokens), cost.exposed_transfer_s(tokens)
        begin_s = max(now_s + exposed_s - whole_s, replica.link_free_s, flight.decode.link_free_s)
        landed_s = max(now_s, begin_s + whole_s)
        replica.link_free_s = flight.decode.link_free_s = landed_s
        replica.handoffs += 1
        trip.handoff_s += landed_s - now_s
        if not self._cluster.paired:
            self._router.handed_over(flight.decode, tokens, landed_s - now_s)
        self._timeline.at(landed_s, Rank.NEWS, partial(self._landed, flight))

    def _landed(self, flight: _Flight) -> None:
        if flight.prefill is not None:
            flight.prefill.handoffs -= 1
        if flight.request_id in self._flights:
            flight.landed = True
            flight.decode.start(flight.request_id)

    def first_token(self, replica: Replica, request_id: str, now_s: float) -> None:
        """A decode worker that computes whole sequences has finished a prompt, perhaps again after preemption."""
        flight = self._flights[request_id]
        if flight.trip.sent == flight.before:
            started_s = replica.scheduler.timing(request_id).scheduled_s
            flight.trip.queue_s += (started_s or now_s) - flight.dispatched_s
            self._first(flight, now_s)

    def finished(self, replica: Replica, request_id: str, now_s: float) -> None:
        self._finish(self._flights[request_id], now_s)

    def _first(self, flight: _Flight, now_s: float) -> None:
        trip = flight.trip
        if trip.sent == 0:
            trip.first_token_s = now_s
            if self._entry is not None:
                self._entry.first_token(flight.index)
            if self._slo and trip.ttft_s > self._slo.ttft_s:
                self._missed += 1
        trip.sent += 1

    def _finish(self, flight: _Flight, now_s: float) -> None:
        trip, slo = flight.trip, self._slo
        trip.last_token_s, trip.sent, trip.end = now_s, trip.output_tokens, End.FINISHED
        if slo and trip.ttft_s <= slo.ttft_s:
            in_time = trip.tpot_s <= slo.tpot_s
            self._met, self._missed = self._met + in_time, self._missed + (not in_time)
        del self._flights[flight.request_id]
        self._leave(flight.index)

    def _drop(self, flight: _Flight, end: End) -> None:
        del self._flights[flight.request_id]
        self._end(flight.index, end)

    def _end(self, index: int, end: End) -> None:
        """Without having been served."""
        trip, slo = self._trips[index], self._slo
        trip.end = end
        if not (slo and trip.sent and trip.ttft_s > slo.ttft_s):  # else it was counted at its first token
            self._missed += 1
        self._leave(index)

    def _leave(self, index: int) -> None:
        self._inflight -= 1
        if self._entry is not None:
            self._entry.left(index, self._trips[index])

    def _unreserve(self, flight: _Flight) -> None:
        flight.decode.handoffs -= 1
        flight.decode.release(flight.request_id)

    # ---- the router's view

    def _choose_decode(self, tokens: int, keys: tuple[int, ...], index: int) -> Replica | None:
        workers = self._able("decode")
        if self._cluster.paired:
            return workers[index % len(workers)] if workers else None
        return self._router.decode(workers, tokens, keys, self._lines)

    def _choose_prefill(self, tokens: int, keys: tuple[int, ...], index: int) -> Replica | None:
        workers = self._able("prefill")
        if self._cluster.paired:
            return workers[index % len(workers)] if workers else None
        return self._router.prefill(workers, tokens, keys)

    def _able(self, role: Role) -> list[Replica]:
        if role not in self._staying:
            self._staying[role] = [worker for worker in self._pools[role] if worker.alive and not worker.draining]
        return self._staying[role]

    # ---- failures and scaling

    def _change(self, change: Change) -> None:
        pool = self._pools[change.role]
        match change.kind:
            case "kill":
                self._kill(pool[change.index], change.role)
            case "return":
                pool[change.index] = self._worker(change.role, self._spec(change.role))
                self._staying.clear()
            case "grow":
                pool.append(self._worker(change.role, self._spec(change.role)))
                self._staying.clear()
            case "shrink":
                self._able(change.role)[-1].draining = True
                self._staying.clear()
            case never:
                assert_never(never)

    def _kill(self, worker: Replica, role: Role) -> None:
        """Its requests are tried again elsewhere with what the client has so far as part of the prompt."""
        hit = [f for f in self._flights.values() if (f.decode if role == "decode" else f.prefill) is worker]
        lost = [flight for flight in hit if role == "decode" or not flight.landed]
        for flight in lost:
            if role == "decode" and (flight.landed or flight.local):
                flight.trip.sent = flight.before + worker.outputs(flight.request_id)
        worker.kill()
        self._staying.clear()
        self._router.forget(worker)
        self._lines.pop(worker.name, None)
        for flight in lost:
            del self._flights[flight.request_id]
            if role == "prefill":
                self._unreserve(flight)
            self._dispatch(flight.index)

    def _spec(self, role: Role) -> Pool:
        spec = self._cluster.prefill if role == "prefill" else self._cluster.decode
        if spec is None:
            raise ValueError("the cluster has no prefill pool")
        return spec

    def _workers(self, role: Role, spec: Pool) -> list[Replica]:
        return [self._worker(role, spec) for _ in range(spec.replicas * spec.stages)]

    def _worker(self, role: Role, spec: Pool) -> Replica:
        kv_tokens = spec.cost.kv_tokens() // spec.stages
        name = f"{role}-{len(self._made):04d}"
        worker = Replica(
            name,
            spec.cost,
            spec.limits,
            kv_tokens=kv_tokens,
            timeline=self._timeline,
            listener=self,
            host=self._host,
            fast=self._fast,
        )
        self._made.append(worker)
        return worker
