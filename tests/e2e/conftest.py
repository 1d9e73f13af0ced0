"""Real clusters and a real gRPC client for the end-to-end tests.

Every cluster has its own Ray, temporary folder, ports and HOME, and is ended with the session.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import grpc
import psutil
import pytest

from baton.config import Config, parse
from baton.wire import inference_pb2 as pb
from baton.wire import inference_pb2_grpc
from deploy import local
from deploy.supervisor import free_ports

CALL_TIMEOUT_S = 120.0
MESSAGE_LIMIT = [("grpc.max_send_message_length", 100 << 20), ("grpc.max_receive_message_length", 100 << 20)]


@dataclass
class Answer:
    """One finished stream."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: int = 0
    usage: pb.Usage | None = None
    ledger: pb.StageLedger | None = None
    chunks: list[pb.GenerateResponse] = field(default_factory=list)


class Client:
    """The generated stub, with answers collected."""

    def __init__(self, address: str, http: str, home: Path, credentials: grpc.ChannelCredentials | None = None) -> None:
        self.address, self.http, self.home = address, http, home
        if credentials is None:
            self.channel = grpc.insecure_channel(address, options=MESSAGE_LIMIT)
        else:
            self.channel = grpc.secure_channel(address, credentials, options=MESSAGE_LIMIT)
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)

    def stream(self, **fields: Any) -> Any:
        timeout_s = fields.pop("timeout_s", CALL_TIMEOUT_S)
        return self.stub.Generate(pb.GenerateRequest(**fields), timeout=timeout_s)

    def generate(self, **fields: Any) -> Answer:
        answer = Answer()
        for chunk in self.stream(**fields):
            answer.chunks.append(chunk)
            answer.tokens += chunk.token_ids
            answer.text += chunk.text
        last = answer.chunks[-1]
        answer.finish, answer.usage, answer.ledger = last.finish_reason, last.usage, last.ledger
        return answer

    def run(self, watch: Callable[[Any, int], None], **fields: Any) -> tuple[str, int]:
        """The stream's status code and how many tokens came; ``watch(stream, tokens)`` is called after each one."""
        tokens = 0
        stream = self.stream(**fields)
        try:
            for chunk in stream:
                tokens += len(chunk.token_ids)
                watch(stream, tokens)
        except grpc.RpcError as error:
            return error.code().name, tokens
        return "OK", tokens

    def status(self) -> pb.GetStatusResponse:
        answer: pb.GetStatusResponse = self.stub.GetStatus(pb.GetStatusRequest(), timeout=10)
        return answer

    def held(self) -> dict[str, int]:
        """Everything that workers and router hold now; empty when all is free."""
        status = self.status()
        held = {"router.inflight": status.router.inflight}
        for pool in status.pools:
            for worker in pool.workers:
                for name in (
                    "waiting", "waiting_tokens", "running", "pages_used", "handoffs",
                    "buffer_bytes_used", "buffer_bytes_quarantined",
                ):  # fmt: skip
                    held[f"{worker.id}.{name}"] = getattr(worker.load, name)
        return {name: amount for name, amount in held.items() if amount}

    def wait_idle(self, timeout_s: float = 15.0) -> None:
        """Returns when nothing is held any more; fails with what still is."""
        deadline_s = time.monotonic() + timeout_s
        while held := self.held():
            assert time.monotonic() < deadline_s, f"still held: {held}"
            time.sleep(0.1)
        time.sleep(0.6)  # one heartbeat: what was idle must stay so
        assert not self.held()

    def wait_ready(self, prefill: int, decode: int, timeout_s: float = 60.0) -> None:
        """Returns when that many workers are ready."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            counts: dict[str, int] = {}
            with contextlib.suppress(grpc.RpcError):
                for pool in self.status().pools:
                    counts[pool.role] = sum(w.state == pb.WORKER_STATE_READY for w in pool.workers)
            if counts.get("prefill", 0) >= prefill and counts.get("decode", 0) >= decode:
                return
            assert time.monotonic() < deadline_s, f"workers ready: {counts}"
            time.sleep(0.1)


@contextlib.contextmanager
def _living_in(home: Path) -> Iterator[None]:
    """Only while a cluster starts or ends: other tests run between the two, and must see the machine's own HOME."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("BATON_HOME", str(home / ".baton"))
        yield


@pytest.fixture(scope="session")
def start_cluster(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path
) -> Callable[..., contextlib.AbstractContextManager[Client]]:
    """A function that starts a cluster for the given configuration and yields a client of it."""
    del model_folder  # resolved once, in the machine's own HOME
    cache_dir = str(Path("~/.cache/baton").expanduser())

    @contextlib.contextmanager
    def start(name: str, credentials: grpc.ChannelCredentials | None = None, **tree: Any) -> Iterator[Client]:
        tree["model"] = {"cache_dir": cache_dir, "dtype": "float32"} | tree.get("model", {})
        ports = free_ports(2)
        tree["ingress"] = {"grpc_port": ports, "http_port": ports + 1} | tree.get("ingress", {})
        config: Config = parse({"name": name, **tree})
        home = tmp_path_factory.mktemp(name)
        lines: list[str] = []
        with _living_in(home):
            endpoints = local.up(config, progress=lines.append)
        try:
            client = Client(endpoints.grpc, endpoints.http, home / ".baton", credentials)
            client.wait_ready(config.prefill.replicas, config.decode.replicas)
            with client.channel:
                yield client
        finally:
            family = psutil.Process(endpoints.pid).children(recursive=True)
            with _living_in(home):
                assert local.down(name, progress=lines.append)
            assert not [process for process in family if process.is_running()], lines

    return start


@pytest.fixture(scope="session")
def nixl_cluster(start_cluster: Callable[..., contextlib.AbstractContextManager[Client]]) -> Iterator[Client]:
    """One prefill and one decode worker with different page sizes, NIXL between them.

    Exact unless a request wants int8; always a handoff.
    """
    with start_cluster(
        "nixl",
        prefill={"page_tokens": 16, "step_tokens": 256, "kv_tokens": 8192},
        decode={"page_tokens": 32, "kv_tokens": 8192},
        handoff={"transport": "nixl", "codec": "raw", "quality_floor": "int8"},
        router={"local_prefill": False},
    ) as client:
        yield client


@pytest.fixture(scope="session")
def tcp_cluster(start_cluster: Callable[..., contextlib.AbstractContextManager[Client]]) -> Iterator[Client]:
    """The same over plain TCP, page sizes the other way round."""
    with start_cluster(
        "tcp",
        prefill={"page_tokens": 32, "step_tokens": 256, "kv_tokens": 8192},
        decode={"page_tokens": 16, "kv_tokens": 8192},
        handoff={"transport": "tcp"},
        router={"local_prefill": False},
        observe={"log_format": "json", "log_level": "debug"},
    ) as client:
        yield client


ENGLISH = topics["execmodel"]


def chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"chat": pb.Chat(messages=[pb.ChatMessage(role=roles[i % 2], content=text) for i, text in enumerate(turns)])}


def _prompts() -> list[tuple[str, dict[str, Any]]]:
    """At least twenty prompts; none longer than 1,984 tokens, so that 64 more fit a context of 2,048."""
    numbers = random.Random(7)
    return [
        ("chat short", chat("What is the capital of France?")),
        ("chat turns", chat("Name a fruit.", "Apple.", "Name another one, and say why you like it.")),
        ("chat poem", chat("Write a poem about a relay race in four lines.")),
        ("chat maths", chat("What is 17 times 23? Think step by step.")),
        ("code python", {"prompt": "def fibonacci(n):\n    "}),
        ("code sql", {"prompt": "SELECT name, COUNT(*) FROM users WHERE"}),
        ("code c", {"prompt": "#include <stdio.h>\n\nint main(void) {\n"}),
        ("english", {"prompt": "The history of the steam engine begins"}),
        ("english 200", {"prompt": ENGLISH[:900]}),
        ("english 700", {"prompt": ENGLISH[:3200]}),
        ("english 1500", {"prompt": ENGLISH[:6800]}),
        ("chinese", {"prompt": "今天天气很好，我们一起去公园"}),
        ("chinese chat", chat("请用中文介绍一下你自己。")),
        ("emoji", {"prompt": "I love 🍕 and 🍣 because 😀"}),
        ("arabic", {"prompt": "مرحبا بالعالم"}),
        ("one token", {"token_ids": pb.TokenIds(ids=[504])}),
        ("two tokens", {"prompt": "Once upon"}),
        ("newlines", {"prompt": "\n\n\n1.\n2.\n3.\n"}),
        ("random ids", {"token_ids": pb.TokenIds(ids=[numbers.randrange(100, 49000) for _ in range(333)])}),
        ("page edge", {"token_ids": pb.TokenIds(ids=[numbers.randrange(100, 49000) for _ in range(64)])}),
        ("chunk edge", {"token_ids": pb.TokenIds(ids=[numbers.randrange(100, 49000) for _ in range(256)])}),
        ("almost full", {"token_ids": pb.TokenIds(ids=[numbers.randrange(100, 49000) for _ in range(1984)])}),
    ]


@pytest.fixture(scope="session")
def prompts() -> list[tuple[str, dict[str, Any]]]:
    return _prompts()
