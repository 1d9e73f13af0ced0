"""The open loop over real gRPC, against a server that paces its tokens by the clock instead of by a model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from baton.wire import inference_pb2 as pb
from baton.wire import inference_pb2_grpc
from bench import goodput
from bench.load import CUT_OFF, Ask, Target, run
from bench.workload import Planned

CONTEXT = 512
TOKEN_S = 0.02


class Paced(inference_pb2_grpc.InferenceServicer):  # type: ignore[misc]
    """One token every ``TOKEN_S``; refuses prompts that start with token 0; keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []

    async def ListModels(self, request: object, context: object) -> pb.ListModelsResponse:  # noqa: N802
        model = pb.Model(id="paced", max_context_tokens=CONTEXT, vocab_size=100, eos_token_ids=[0, 2])
        return pb.ListModelsResponse(models=[model])

    async def GetStatus(self, request: object, context: object) -> pb.GetStatusResponse:  # noqa: N802
        return pb.GetStatusResponse(model="paced", transport="tcp", codec="raw", pools=[pb.Pool(role="decode")])

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        if request.token_ids.ids[0] == 0:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        for index in range(request.sampling.max_tokens):
            await asyncio.sleep(TOKEN_S)
            last = index + 1 == request.sampling.max_tokens
            stages = [pb.StageLedger.Stage(name="decode", seconds=TOKEN_S * (index + 1))]
            yield pb.GenerateResponse(
                token_ids=[7],
                finish_reason=pb.FINISH_REASON_LENGTH if last else pb.FINISH_REASON_UNSPECIFIED,
                ledger=pb.StageLedger(stages=stages, transfer_busy_s=0.01, transfer_bytes=64) if last else None,
            )


@pytest.fixture
async def served() -> AsyncIterator[tuple[Paced, str]]:
    servicer, server = Paced(), grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servicer, f"127.0.0.1:{port}"
    await server.stop(None)


def ask(at_s: float, tokens: int, first_id: int = 9) -> Ask:
    how = pb.Sampling(max_tokens=tokens)
    return Ask(Planned(at_s, 1, tokens), pb.GenerateRequest(token_ids=pb.TokenIds(ids=[first_id]), sampling=how))


def ignore(sent: int, ended: int) -> None:
    pass


async def test_requests_leave_when_due_and_everything_is_recorded(served: tuple[Paced, str]) -> None:
    asks = [ask(0.0, 20), ask(0.1, 3), ask(0.15, 2, first_id=0)]
    seen: list[tuple[int, int]] = []
    async with Target(served[1], channels=2) as target:
        await target.connect(5.0)
        slow, quick, refused = await run(
            target, asks, timeout_s=10.0, stop=asyncio.Event(), progress=lambda *counts: seen.append(counts)
        )
    assert slow.ok
    assert quick.ok
    assert quick.sent_s < slow.token_times_s[-1]  # an open loop: the first one still ran
    assert slow.e2e_s >= 20 * TOKEN_S
    assert slow.tpot_s == pytest.approx(TOKEN_S, rel=0.5)
    assert slow.stages == pytest.approx({"decode": 20 * TOKEN_S})
    assert (slow.transfer_bytes, slow.transfer_busy_s) == (64, 0.01)
    assert (refused.status, refused.message, refused.ok) == ("RESOURCE_EXHAUSTED", "full", False)
    assert seen[-1] == (3, 3)


async def test_a_request_that_takes_too_long_is_a_miss(served: tuple[Paced, str]) -> None:
    async with Target(served[1], channels=1) as target:
        (late,) = await run(target, [ask(0.0, 400)], timeout_s=0.2, stop=asyncio.Event(), progress=ignore)
    assert late.status == "DEADLINE_EXCEEDED"
    assert not late.ok


async def test_stopping_cuts_off_what_runs_and_sends_no_more(served: tuple[Paced, str]) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.15, stop.set)
    async with Target(served[1], channels=1) as target:
        records = await run(
            target, [ask(0.0, 2), ask(0.0, 400), ask(60.0, 1)], timeout_s=100.0, stop=stop, progress=ignore
        )
    assert [record.status for record in records] == ["OK", CUT_OFF]
    assert len(served[0].requests) == 2


async def test_a_sweep_writes_figures_and_picture(served: tuple[Paced, str], tmp_path: Path) -> None:
    chosen = goodput.options(
        [
            "--address", served[1], "--sweep", "20,40", "--requests", "6", "--warmup", "2", "--prompt", "uniform:3:9",
            "--output", "4", "--ttft-ms", "2000", "--tpot-ms", "500", "--results", str(tmp_path), "--label", "test",
            "--rest", "0.2",
        ]
    )  # fmt: skip
    document = await goodput.measure(chosen)
    assert not document["partial"]
    assert document["goodput"] == {"rate_per_s": 40.0, "bounded": False}
    assert [len(one["records"]) for one in document["runs"]] == [6, 6]  # warm-up is not counted
    (path,) = tmp_path.glob("goodput-*-test.json")
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(document))
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for request in served[0].requests:
        assert 3 <= len(request.token_ids.ids) <= 9
        assert not {0, 2} & set(request.token_ids.ids)  # no end-of-turn token in a prompt
        assert request.sampling.ignore_eos
        assert request.sampling.max_tokens == 4
    machine = document["machine"]
    assert machine["cores"] >= 1
    assert machine["memory_gib"] > 0.0
    assert document["at_rest"]["busy"] >= 0.0  # an idle machine may do less than its clock can tell
    for cores in (document["at_rest"], *(one["cores"] for one in document["runs"])):
        assert cores["busy"] <= machine["cores"] * 1.05
        assert cores["stolen"] >= 0.0
    assert all(one["cores"]["busy"] > 0.0 for one in document["runs"])


async def test_an_interrupt_keeps_what_was_measured(served: tuple[Paced, str], tmp_path: Path) -> None:
    chosen = goodput.options(
        [
            "--address",
            served[1],
            "--rate",
            "20",
            "--requests",
            "2000",
            "--output",
            "2",
            "--results",
            str(tmp_path),
            "--rest",
            "0.1",
        ]
    )

    async def interrupt() -> None:
        while len(served[0].requests) < 30:  # some of them are over then, even on a busy machine
            await asyncio.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    document, _ = await asyncio.gather(goodput.measure(chosen), interrupt())
    assert document["partial"]
    records = document["runs"][0]["records"]
    assert 0 < len(records) < 2000
    assert {record["status"] for record in records} == {"OK"}
    assert len(list(tmp_path.glob("goodput-*-partial.json"))) == 1


def test_a_trace_gives_sizes_and_times(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    rows = "\n".join(f"2023-11-16 18:15:{second:02}.0000000,{400 + second},{second + 1}" for second in range(10))
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}\n", encoding="utf-8")
    basis = ["--trace", str(path), "--warmup", "2", "--requests", "8"]
    own = goodput.plan(goodput.options(basis), None, 405)
    assert [one.at_s for one in own] == [float(second) for second in range(10)]
    assert all(one.prompt_tokens + one.output_tokens <= 405 for one in own)
    assert [one.output_tokens for one in own] == list(range(1, 11))
    faster = goodput.plan(goodput.options([*basis, "--rate", "4"]), 4.0, 405)
    assert faster[-1].at_s == pytest.approx(9 / 4)
    random_times = goodput.plan(goodput.options([*basis, "--rate", "4", "--arrivals", "poisson"]), 4.0, 405)
    assert [one.output_tokens for one in random_times] == list(range(1, 11))
    assert random_times[-1].at_s != pytest.approx(9 / 4)
    with pytest.raises(ValueError, match="has 10 requests"):
        goodput.plan(goodput.options(["--trace", str(path), "--requests", "50"]), None, 405)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "need --rate"),
        (["--arrivals", "trace", "--rate", "1"], "needs --trace"),
        (["--rate", "0"], "not above 0"),
        (["--rate", "nan"], "not above 0"),
        (["--sweep", "1,-2"], "not above 0"),
        (["--rate", "1", "--sweep", "2"], "not allowed with"),
        (["--rate", "1", "--requests", "0"], "not at least 1"),
        (["--rate", "1", "--prompt", "some"], "such as 512"),
    ],
)
def test_bad_options_are_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        goodput.options(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_an_endpoint_that_refuses_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(goodput, "CONNECT_S", 0.3)
    assert goodput.main(["--address", "127.0.0.1:9", "--rate", "1"]) == 1
    assert capsys.readouterr().err == "error: 127.0.0.1:9 does not answer\n"
