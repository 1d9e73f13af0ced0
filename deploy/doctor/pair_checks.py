"""Judges workers and pairs of them. Pure: facts in, findings out.

The rule about transports: what is in use must be what was asked for, or the best that these two machines can do. The
kernel's own count of bytes that came over TCP says what was in use, whatever a library believes.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.config_handoff import EXACT_CODECS
from baton.host import HostFacts
from baton.wire import inference_pb2 as pb
from deploy.doctor.facts import Direction, Pair, Worker
from deploy.doctor.findings import Finding, fail, ok, warn
from deploy.draw import milliseconds, size

SKEW_WARN_S, SKEW_FAIL_S = 1.0, 300.0  # logs and traces mix up; certificates are not yet or no longer valid
SLOW_BYTES_S = 125e6  # 1 Gb/s


def state(name: str, told: pb.WorkerState) -> Finding:
    """What the router says of a worker."""
    if told == pb.WORKER_STATE_READY:
        return ok("state", name, "ready")
    if told == pb.WORKER_STATE_DRAINING:
        return warn(
            "state", name, "draining",
            why="it takes no new requests and is not probed", fix="baton status   # until it has left",
        )  # fmt: skip
    if told == pb.WORKER_STATE_SUSPECT:
        return warn(
            "state", name, "suspected by the router: it was silent, or failed too often lately",
            why="it gets requests only while no other worker can take them",
            fix="ray logs actor   # of this replica and of the router; it is trusted again after 5 to 40 s of peace",
        )  # fmt: skip
    return fail(
        "state", name, "lost" if told == pb.WORKER_STATE_LOST else "the router cannot connect to it",
        why="it serves nobody", fix="ray logs actor   # of this replica; Serve replaces one whose health check fails",
    )  # fmt: skip


def empty(role: str) -> Finding:
    return fail(
        "state", role, "the pool has no worker",
        why="no request can be served", fix="baton status && ray status   # do its resources exist, does it start?",
    )  # fmt: skip


def reached(worker: Worker) -> Finding:
    """Whether the doctor could talk to it, and how far away it is."""
    if worker.error:
        return fail(
            "worker", worker.name, f"{worker.address}: {worker.error}",
            why="routers reach workers at this address too; one that they cannot reach serves nobody",
            fix=f"nc -vz {worker.address.replace(':', ' ')}   # from one of its nodes; then see its log",
        )  # fmt: skip
    return ok("worker", worker.name, f"{worker.address}, {milliseconds(worker.rtt_s)} there and back")


def clock(worker: Worker) -> Finding | None:
    """Skew beyond what the round trip explains. Deadlines travel as durations, so no request is hurt by it."""
    if worker.host is None:
        return None
    skew_s = max(0.0, abs(worker.ahead_s) - worker.rtt_s / 2)
    if skew_s < SKEW_WARN_S:
        return ok("clock", worker.name, f"within {milliseconds(max(skew_s, worker.rtt_s / 2))} of this machine's")
    message = f"{skew_s:.1f} s {'ahead of' if worker.ahead_s > 0 else 'behind'} this machine's"
    why = "logs and traces of one request cannot be put in order, and certificates may look expired"
    fix = f"ssh {worker.host.hostname} chronyc -a makestep   # or: timedatectl set-ntp true"
    if skew_s >= SKEW_FAIL_S:
        return fail("clock", worker.name, message, why=why, fix=fix)
    return warn("clock", worker.name, message, why=why, fix=fix)


def versions(workers: Sequence[Worker]) -> list[Finding]:
    """Packages of which the workers run several versions."""
    known = [worker for worker in workers if worker.host is not None]
    seen: dict[str, dict[str, list[str]]] = {}
    for worker in known:
        assert worker.host is not None
        for package, version in {**worker.host.packages, "python": worker.host.python}.items():
            seen.setdefault(package, {}).setdefault(version, []).append(worker.name)
    findings = [
        warn(
            "versions", package, "; ".join(f"{version} on {', '.join(names)}" for version, names in by_version.items()),
            why="results may differ in the last bit, and the protocol may differ altogether",
            fix="deploy one image or one lock file to every node",
        )
        for package, by_version in sorted(seen.items())
        if len(by_version) > 1
    ]  # fmt: skip
    if known and not findings:
        findings.append(ok("versions", "all workers", "one version of everything"))
    return findings


def pair(found: Pair, configured: str) -> list[Finding]:
    """Everything about one prefill and decode worker; ``configured`` is the transport that the configuration names."""
    subject = f"{found.prefill.name} -> {found.decode.name}"
    if found.prefill.error or found.decode.error:
        return []  # said of the worker already
    mismatch = layout(found.prefill, found.decode, subject)
    if mismatch.status != "ok":
        return [mismatch]
    findings = [mismatch, *(handoff(one, found, subject) for one in found.forward)]
    first = found.forward[0] if found.forward else None
    if first is not None and first.landed is not None:
        findings.append(transport(first, found.prefill, found.decode, configured, subject))
    if found.back is not None:
        findings.append(handoff(found.back, found, f"{found.decode.name} -> {found.prefill.name}"))
    return findings


def layout(prefill: Worker, decode: Worker, subject: str) -> Finding:
    """Page size, tensor parallel degree and dtype may differ; the fingerprint covers what may not."""
    assert prefill.hello is not None
    assert decode.hello is not None
    mine, theirs = prefill.hello, decode.hello
    if mine.layout == theirs.layout:
        dtypes = mine.dtype if mine.dtype == theirs.dtype else f"{mine.dtype}, landing as {theirs.dtype}"
        return ok("layout", subject, f"{theirs.layout}, {dtypes}")
    return fail(
        "layout", subject, f"{mine.layout} and {theirs.layout}: other weights or another model",
        why="every handoff between them is refused, since KV of one would be nonsense to the other",
        fix="sha256sum MODEL_FOLDER/*.safetensors MODEL_FOLDER/config.json   # on both nodes; copy the same files",
    )  # fmt: skip


def handoff(found: Direction, pair: Pair, subject: str) -> Finding:
    """One real handoff: that it landed, bit by bit, and how fast."""
    check = f"handoff, {found.codec}"
    if found.busy:
        return warn(
            check, subject, f"not measured: {found.error}",
            why="a worker with waiting requests refuses probes, so that they delay nobody",
            fix="baton doctor   # once more, later",
        )  # fmt: skip
    if found.error or found.sent is None or found.landed is None:
        host, _, _ = pair.decode.address.rpartition(":")
        return fail(
            check, subject, found.error or "one side did not answer",
            why="no request can be handed over between these two",
            fix=f"ping {host}   # from the other node; workers listen on any free port: allow all TCP between them",
        )  # fmt: skip
    if found.codec in EXACT_CODECS and not found.landed.exact:
        return fail(
            check, subject, "what landed is not what was sent",
            why="tokens would be computed from wrong KV",
            fix="stop serving on these nodes and test their memory and network card",
        )  # fmt: skip
    return _speed(found, check, subject)


def _speed(found: Direction, check: str, subject: str) -> Finding:
    assert found.sent is not None
    assert found.landed is not None
    rate, sent = found.bytes_per_s, found.sent
    message = f"{rate / 1e9:.2f} GB/s of KV, one token in {milliseconds(sent.latency_s)}"
    if found.codec == "raw":  # the other probe is small: it proves the codec and measures little
        message += (
            f"; the link alone {sent.link_bytes_per_s / 1e9:.1f} GB/s, {milliseconds(sent.link_latency_s)} a fetch"
        )
    if found.codec != "raw" or rate >= SLOW_BYTES_S:
        return ok(check, subject, message)
    return warn(
        check, subject, message,
        why=f"raw KV crosses at less than 1 Gb/s ({size(sent.kv_bytes)} were probed): first handoffs wait for it",
        fix="iperf3 -c HOST   # if the network is slow: handoff.codec: int8-zstd with handoff.quality_floor: int8",
    )  # fmt: skip


def transport(found: Direction, sender: Worker, lander: Worker, configured: str, subject: str) -> Finding:
    """Refuses a silent fallback: what carried the bytes against what was asked for and what was possible."""
    assert found.landed is not None
    if found.landed.transport != configured:
        return fail(
            "transport", subject, f"{found.landed.transport}, configured: {configured}",
            why="the workers run another configuration than the one that was given",
            fix="baton down && baton up --config FILE   # or serve deploy the new configuration",
        )  # fmt: skip
    carrier = found.landed.carrier
    if configured != "nixl" or sender.host is None or lander.host is None:
        return ok("transport", subject, carrier or configured)
    over_tcp = 2 * found.landed.tcp_bytes >= found.landed.wire_bytes or carrier.startswith("tcp")
    asked = lander.host.ucx.get("UCX_TLS", "")
    better = faster(sender.host, lander.host)
    if not over_tcp:
        return ok("transport", subject, f"nixl: {carrier or better or 'something else than TCP'}")
    if asked and not _allows_tcp(asked):
        return fail(
            "transport", subject, f"nixl over TCP ({carrier}), although UCX_TLS={asked}",
            why="UCX did not take what the configuration names", fix=f"UCX_LOG_LEVEL=info UCX_TLS={asked} ucx_info -d",
        )  # fmt: skip
    if _allows_only_tcp(asked):
        return ok("transport", subject, f"nixl over TCP, as UCX_TLS={asked} says: {carrier}")
    if not better:
        return ok("transport", subject, f"nixl over TCP, the only way between these machines: {carrier}")
    return fail(
        "transport", subject, f"nixl fell back to TCP ({carrier}), although {better} is possible",
        why="handoffs take several times as long as these machines allow", fix=_mend(better, asked),
    )  # fmt: skip


def faster(one: HostFacts, other: HostFacts) -> str:
    """The best way between two processes that is not TCP; empty when there is none."""
    if one.rdma_devices and other.rdma_devices and one.boot_id != other.boot_id:
        return "RDMA"
    same = one.boot_id and one.boot_id == other.boot_id and one.pid_namespace == other.pid_namespace
    allowed = one.user_id == other.user_id and (not max(one.ptrace_scope, other.ptrace_scope) or one.user_id == 0)
    if same and allowed:
        return "shared memory"
    return "RDMA" if one.rdma_devices and other.rdma_devices else ""


def _allows_tcp(asked: str) -> bool:
    names = [name.strip() for name in asked.removeprefix("^").split(",")]
    return ("tcp" in names or "all" in names) != asked.startswith("^")


def _allows_only_tcp(asked: str) -> bool:
    return bool(asked) and not asked.startswith("^") and {n.strip() for n in asked.split(",")} <= {"tcp", "self"}


def _mend(better: str, asked: str) -> str:
    if asked:
        return f"unset UCX_TLS   # it is {asked}; or clear handoff.ucx_tls"
    if better == "RDMA":
        return "ulimit -l unlimited && ibv_devinfo   # containers: IPC_LOCK and the device; then UCX_TLS=rc,self"
    return "UCX_TLS=cma,sysv,posix,self UCX_LOG_LEVEL=info ucx_info -d   # containers: one PID namespace, SYS_PTRACE"
