"""Judges this machine for one configuration. Pure: facts in, findings out."""

from __future__ import annotations

from baton.config import Config
from baton.config_handoff import HandoffConfig
from baton.config_security import SecurityConfig
from baton.errors import BatonError, ConfigError
from baton.host import UNLIMITED, HostFacts
from deploy.doctor.facts import Machine, ModelFiles, Package, Port, Torch
from deploy.doctor.findings import Finding, fail, ok, warn
from deploy.draw import size

PYTHON_FROM, PYTHON_BELOW = (3, 11), (3, 14)  # pyproject.toml, requires-python
SHM_NEEDED_BYTES = 256 << 20  # Ray's object store (100 MiB as `baton up` sizes it) and UCX's segments
TMP_NEEDED_BYTES = 1 << 30
TMP_FULL = 0.95  # from there on Ray stops creating objects
FILES_OF_A_WORKER = 1024  # Ray, NIXL and a connection per peer
WORKER_BASE_BYTES = 512 << 20  # a process with torch and Ray, before weights and KV: measured on Linux x86-64


def python(host: HostFacts) -> Finding:
    version = tuple(int(part) for part in host.python.split(".")[:2])
    if PYTHON_FROM <= version < PYTHON_BELOW:
        return ok("python", "this machine", host.python)
    return fail(
        "python", "this machine", f"{host.python}, supported: 3.11 to 3.13",
        why="Baton is tested on these versions only, and its dependencies have no wheels for others",
        fix="uv venv --python 3.11 && uv pip install .",
    )  # fmt: skip


def packages(found: tuple[Package, ...]) -> list[Finding]:
    """One line when all is well, else one per package."""
    wrong = [package for package in found if not package.fits]
    if not found:
        return [
            warn(
                "packages", "baton", "not installed as a package, so its requirements are not known",
                why="versions cannot be compared", fix="pip install .",
            )
        ]  # fmt: skip
    if not wrong:
        return [ok("packages", "all", f"{len(found)} requirements met")]
    return [
        fail(
            "packages", package.requirement, f"installed: {package.installed or 'no'}",
            why="Baton is tested with this version; others may lack what it calls",
            fix=f"pip install '{package.requirement}'",
        )
        for package in wrong
    ]  # fmt: skip


def torch(host: HostFacts, found: Torch) -> Finding:
    """Whether torch works, and sees the GPUs that are here."""
    if found.error:
        return fail(
            "torch", "this machine", f"cannot be imported: {found.error}",
            why="no worker starts without it", fix="pip install --force-reinstall torch",
        )  # fmt: skip
    if host.nvidia_gpus and not found.devices:
        reason = f"is built for CUDA {found.cuda}, the driver fits another" if found.cuda else "is a build without CUDA"
        return fail(
            "torch", "this machine", f"{host.nvidia_gpus} NVIDIA GPUs, but torch {found.version} {reason}",
            why="workers would silently compute on the CPU",
            fix="nvidia-smi && pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126",
        )  # fmt: skip
    return ok("torch", "this machine", f"{found.version}, {_gpus(found)}")


def _gpus(found: Torch) -> str:
    return f"{found.devices} GPUs, CUDA {found.cuda}" if found.devices else "no GPU here: workers compute on the CPU"


def compiler(machine: Machine) -> Finding:
    if machine.compiler:
        return ok("compiler", "this machine", machine.compiler)
    return warn(
        "compiler", "this machine", "no g++ or c++",
        why="the CPU's kernels and codecs are compiled at the first start; without them torch's slower path is used",
        fix="apt-get install g++",
    )  # fmt: skip


def tensor_parallel(config: Config, model: ModelFiles, found: Torch) -> list[Finding]:
    """Degrees that the model does not divide into, or for which this machine has too few GPUs."""
    findings = []
    for name, pool in (("prefill", config.prefill), ("decode", config.decode)):
        degree, key = pool.tensor_parallel, f"{name}.tensor_parallel"
        if pool.gpus and degree > found.devices > 0:
            findings.append(
                fail(
                    "tensor parallel", key, f"is {degree} on a machine with {found.devices} GPUs",
                    why="a worker's ranks are on one machine and take a GPU each, so the workers refuse to start",
                    fix=f"set {key} to {found.devices} or less",
                )
            )  # fmt: skip
        if model.kv_heads and model.kv_heads % degree:
            fitting = ", ".join(str(n) for n in range(1, model.kv_heads + 1) if model.kv_heads % n == 0)
            findings.append(
                fail(
                    "tensor parallel", key, f"is {degree}, which does not divide the model's {model.kv_heads} KV heads",
                    why="each rank holds whole KV heads, so the workers refuse to start",
                    fix=f"set {key} to one of {fitting}",
                )
            )  # fmt: skip
    return findings


def configuration(source: str, error: ConfigError | None) -> Finding:
    if error is None:
        return ok("config", source, "every key is known and within its limits")
    return fail(
        "config", source, str(error),
        why="nothing starts with it, and what depends on it cannot be checked",
        fix=f"edit {error.field or source}   # docs/config.md says what is allowed",
    )  # fmt: skip


def cluster_key(security: SecurityConfig, *, given: bool) -> Finding:
    """Without one `baton up` makes a key of its own; every other way of deploying needs one."""
    if given:
        return ok("cluster key", "security", "given; workers and routers prove it to each other")
    if security.allow_unauthenticated:
        return warn(
            "cluster key", "security", "none, and security.allow_unauthenticated is set",
            why="whoever reaches a worker's port can read prompts and hand it KV",
            fix="openssl rand -base64 48 > cluster.key && chmod 600 cluster.key   # then security.cluster_key_file",
        )  # fmt: skip
    return ok("cluster key", "security", "none given: `baton up` makes one for its cluster; others must be given one")


def no_handoff(config: Config, model: ModelFiles) -> Finding | None:
    """Why no handoff is tried here; None when one should be."""
    if not config.prefill.replicas:
        return ok("handoff", "this machine", "prefill.replicas is 0: nothing is handed over")
    if config.handoff.transport == "loopback":
        return fail(
            "handoff", "this machine", "transport loopback joins workers of one process only",
            why="a prefill pool's workers are processes of their own, so the start is refused",
            fix="set handoff.transport to nixl or tcp",
        )  # fmt: skip
    if model.layout is None:
        return warn(
            "handoff", "this machine", "not tried: without the model's files its KV layout is not known",
            why="the transport remains unproven", fix=f"baton model pull {model.model_id} && baton doctor",
        )  # fmt: skip
    return None


def no_worker(handoff: HandoffConfig, error: BatonError) -> Finding:
    """A process that should take part in the handoff did not start."""
    return fail(
        "handoff", f"over {handoff.transport}", str(error),
        why="workers would fail at their start in the same way",
        fix=f"pip install '{handoff.transport}'   # or set handoff.transport: tcp" if handoff.transport == "nixl"
        else f"edit {error.field or 'handoff'}   # docs/config.md says what is allowed",
    )  # fmt: skip


def memlock(host: HostFacts, config: Config) -> Finding:
    """RDMA pins every registered page; shared memory and TCP pin none."""
    needed = max(config.handoff.landing_bytes, config.handoff.staging_bytes)
    limit = "unlimited" if host.memlock_bytes == UNLIMITED else size(host.memlock_bytes)
    enough = host.memlock_bytes == UNLIMITED or host.memlock_bytes >= needed
    pinned = config.handoff.transport == "nixl" and host.rdma_devices
    if enough or not pinned:
        use = f", {size(needed)} are registered" if pinned else ", nothing is pinned without RDMA"
        return ok("memlock", host.hostname, f"{limit}{use}")
    return fail(
        "memlock", host.hostname, f"{limit}, but {size(needed)} are registered with {', '.join(host.rdma_devices)}",
        why="registration with the RDMA device fails, and UCX would go on over TCP",
        fix="ulimit -l unlimited   # containers: --ulimit memlock=-1 or the capability IPC_LOCK",
    )  # fmt: skip


def open_files(host: HostFacts, config: Config) -> Finding:
    """A router holds two connections for each request in flight, a worker one for each peer."""
    needed = FILES_OF_A_WORKER + 2 * config.router.max_inflight
    if host.open_files == UNLIMITED or host.open_files >= needed:
        return ok("open files", host.hostname, "unlimited" if host.open_files == UNLIMITED else f"{host.open_files:,}")
    message = f"{host.open_files:,}, up to {needed:,} are used at router.max_inflight {config.router.max_inflight}"
    why = "beyond it connections are refused, Ray's own among them"
    fix = f"ulimit -n {max(needed, 65536)}"
    if host.open_files < FILES_OF_A_WORKER:
        return fail("open files", host.hostname, message, why=why, fix=fix)
    return warn("open files", host.hostname, message, why=why, fix=fix)


def shared_memory(host: HostFacts) -> Finding:
    if host.shm_free_bytes >= SHM_NEEDED_BYTES:
        return ok("/dev/shm", host.hostname, f"{size(host.shm_free_bytes)} free of {size(host.shm_bytes)}")
    message = f"{size(host.shm_free_bytes)} free of {size(host.shm_bytes)}, {size(SHM_NEEDED_BYTES)} are used"
    return fail(
        "/dev/shm", host.hostname, message,
        why="Ray puts its object store there and does not start, or falls back to the disk; UCX shares memory there",
        fix="mount -o remount,size=2G /dev/shm   # containers: --shm-size=2g, or an emptyDir of medium Memory",
    )  # fmt: skip


def disk(machine: Machine) -> Finding:
    used = 1.0 - machine.tmp_free_bytes / machine.tmp_bytes if machine.tmp_bytes else 1.0
    message = f"{size(machine.tmp_free_bytes)} free of {size(machine.tmp_bytes)} in {machine.tmp}"
    if machine.tmp_free_bytes >= TMP_NEEDED_BYTES and used < TMP_FULL:
        return ok("disk", machine.tmp, message)
    return fail(
        "disk", machine.tmp, message,
        why="Ray keeps its sessions there and stops creating objects on a disk that is 95 % full",
        fix=f"du -xsh {machine.tmp}/* | sort -h | tail   # and delete what is not needed",
    )  # fmt: skip


def memory(machine: Machine, config: Config, model: ModelFiles, found: Torch) -> Finding | None:
    """Whether all workers of the configuration fit; None when the model is not known or lives on GPUs."""
    if model.layout is None or found.devices:
        return None
    handoff, needed = config.handoff, 0
    for pool, buffers in ((config.prefill, handoff.staging_bytes), (config.decode, handoff.landing_bytes)):
        own = model.weight_bytes + pool.kv_tokens * model.layout.token_bytes + buffers
        needed += pool.replicas * (own + pool.tensor_parallel * WORKER_BASE_BYTES)
    message = f"about {size(needed)} needed, {size(machine.memory_free_bytes)} free of {size(machine.memory_bytes)}"
    if needed <= machine.memory_free_bytes:
        return ok("memory", "all workers", message)
    why = "a worker that the kernel kills takes its streams with it"
    fix = "lower prefill.kv_tokens and decode.kv_tokens, or the number of replicas"
    if needed > machine.memory_bytes:
        return fail("memory", "all workers", message, why=why, fix=fix)
    return warn("memory", "all workers", message, why=why, fix=fix)


def port(found: Port, name: str) -> Finding:
    """Whether ``baton up`` could bind it; held by its own cluster is as good as free."""
    subject, where = found.key, f"{found.host}:{found.number}"
    if found.ours:
        return ok("port", subject, f"{where} is served by the running cluster {name}; see `baton doctor --name {name}`")
    if found.holder:
        return fail(
            "port", subject, f"{where} is in use by {found.holder}",
            why="the endpoint cannot start", fix=f"ss -ltnp 'sport = :{found.number}'   # or set another {subject}",
        )  # fmt: skip
    if found.error:
        return fail(
            "port", subject, f"{where} cannot be bound: {found.error}",
            why="the endpoint cannot start",
            fix=f"set {subject} above 1023 and ingress.host to an address of this host",
        )  # fmt: skip
    return ok("port", subject, f"{where} is free")


def model(found: ModelFiles) -> Finding:
    if found.problem:
        where = f" in {found.folder}" if found.folder else ""
        return fail(
            "model", found.model_id, f"{found.problem}{where}",
            why="workers load it at start and fail", fix=_refetch(found),
        )  # fmt: skip
    if not found.folder:
        return warn(
            "model", found.model_id, "is not on this machine yet",
            why="the first start fetches it, which takes minutes and needs a network",
            fix=f"baton model pull {found.model_id}",
        )  # fmt: skip
    return ok("model", found.model_id, f"{size(found.weight_bytes)} of weights in {found.folder}")


def _refetch(found: ModelFiles) -> str:
    if not found.folder:
        return "set model.id to a Hugging Face folder, a hub id, a .gguf file or smollm2-135m-instruct"
    if not found.cached:
        return f"ls -l {found.folder}   # and copy the damaged file there again"
    return f"mv {found.folder} {found.folder}.damaged && baton model pull {found.model_id}"
