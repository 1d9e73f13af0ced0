"""What disaggregation costs a lone request: TTFT of the service against the same engine in one process.

Alternates between both for every prompt length, so that a noisy machine disturbs them alike; medians are reported.

    baton up && python -m bench.disaggregation --address 127.0.0.1:9000
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import grpc

from baton.config import Config, PoolConfig
from baton.request import Sampling, Work
from baton.wire import inference_pb2 as pb
from baton.wire import inference_pb2_grpc
from bench import machine
from engine import hub
from engine.build import build_engine, load_model
from engine.engine import Engine

CALL_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Handed:
    """One request through the service. Seconds, as the client saw them and as its ledger says."""

    ttft_s: float
    busy_s: float
    exposed_s: float
    nbytes: int


def in_process(engine: Engine, ids: Sequence[int], name: str) -> float:
    """Seconds until the first token of ``ids`` when nothing stands between the caller and the engine."""
    work = Work(name, tuple(ids), Sampling(temperature=0.0, max_tokens=1), 0, CALL_TIMEOUT_S)
    start_s = time.perf_counter()
    engine.add(work)
    while not engine.step():
        pass
    return time.perf_counter() - start_s


def through_service(stub: inference_pb2_grpc.InferenceStub, ids: Sequence[int], codec: str, tokens: int) -> Handed:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids),
        sampling=pb.Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True),
        handoff=pb.Handoff(codec=codec),
    )
    start_s = time.perf_counter()
    first_s, last = 0.0, pb.GenerateResponse()
    for response in stub.Generate(request, timeout=CALL_TIMEOUT_S):
        first_s = first_s or time.perf_counter() - start_s
        last = response
    ledger = last.ledger
    return Handed(first_s, ledger.transfer_busy_s, ledger.transfer_exposed_s, ledger.transfer_bytes)


def compare(
    engine: Engine, stub: inference_pb2_grpc.InferenceStub, *, length: int, codec: str, repeats: int, vocab: int
) -> dict[str, object]:
    """One row: medians of ``repeats`` alternating measurements after one warm-up of each."""
    rng = random.Random(length)
    alone: list[float] = []
    served: list[Handed] = []
    for repeat in range(repeats + 1):
        ids = [rng.randrange(vocab) for _ in range(length)]
        own_s, handed = in_process(engine, ids, f"{length}-{repeat}"), through_service(stub, ids, codec, 8)
        if repeat:
            alone.append(own_s)
            served.append(handed)
    engine_s, ttft_s = statistics.median(alone), statistics.median(run.ttft_s for run in served)
    busy_s = statistics.median(run.busy_s for run in served)
    exposed_s = statistics.median(run.exposed_s for run in served)
    return {
        "prompt_tokens": length,
        "codec": codec,
        "engine_ttft_ms": 1e3 * engine_s,
        "service_ttft_ms": 1e3 * ttft_s,
        "added_ttft_ms": 1e3 * (ttft_s - engine_s),
        "ratio": ttft_s / engine_s,
        "transfer_busy_ms": 1e3 * busy_s,
        "transfer_exposed_ms": 1e3 * exposed_s,
        "hidden_share": 1.0 - exposed_s / busy_s if busy_s else 1.0,
        "wire_bytes": served[-1].nbytes,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="127.0.0.1:9000", help="gRPC endpoint of a running cluster")
    parser.add_argument("--lengths", default="64,512,1900", help="prompt lengths in tokens")
    parser.add_argument("--codecs", default="raw,lossless")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="threads of the engine here; as one prefill worker has")
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    chosen = parser.parse_args(argv)
    config = Config()
    folder = hub.resolve(config.model.id, Path(config.model.cache_dir).expanduser())
    engine = build_engine(
        load_model(folder, config.model.dtype, chosen.threads), PoolConfig(), config.model.max_context
    )
    rows = []
    with grpc.insecure_channel(chosen.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        (model,) = stub.ListModels(pb.ListModelsRequest(), timeout=10).models
        transport = stub.GetStatus(pb.GetStatusRequest(), timeout=10).transport
        for length in map(int, chosen.lengths.split(",")):
            for codec in chosen.codecs.split(","):
                row = compare(engine, stub, length=length, codec=codec, repeats=chosen.repeats, vocab=model.vocab_size)
                rows.append(row)
                print(
                    f"{length:5d} tokens {codec:9s} engine {row['engine_ttft_ms']:8.1f} ms  "
                    f"service {row['service_ttft_ms']:8.1f} ms  added {row['added_ttft_ms']:+7.1f} ms  "
                    f"transfer busy {row['transfer_busy_ms']:7.1f} ms  hidden {row['hidden_share']:.1%}",
                    flush=True,
                )
    document = {
        "date": date.today().isoformat(),
        "machine": machine.describe(),
        "command": "python -m bench.disaggregation " + " ".join(sys.argv[1:] if argv is None else argv),
        "transport": transport,
        "dtype": model.dtype,
        "rows": rows,
    }
    path = chosen.results / f"{date.today().isoformat()}-disaggregation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
