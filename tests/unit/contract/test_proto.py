"""The contract's files: generated stubs are current, names are registered, fields are documented."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path

from google.protobuf.descriptor import FieldDescriptor

from baton.ledger import STAGES
from baton.messages import Load
from baton.wire import inference_pb2 as pb
from baton.wire import inference_pb2_grpc

ROOT = Path(__file__).resolve().parents[3]
PROTO = (ROOT / "proto" / "baton" / "v1" / "inference.proto").read_text(encoding="utf-8")


def check(root: Path) -> subprocess.CompletedProcess[str]:
    script = root / "proto" / "generate.py"
    return subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=60, check=False
    )


def test_regenerating_changes_nothing() -> None:
    result = check(ROOT)
    assert result.returncode == 0, result.stderr


def test_the_check_notices_a_changed_contract_and_a_stale_stub(tmp_path: Path) -> None:
    for name in ("proto/generate.py", "proto/baton/v1/inference.proto"):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    wire = tmp_path / "baton" / "wire"
    wire.mkdir(parents=True)
    for stub in (ROOT / "baton" / "wire").glob("*_pb2*"):
        (wire / stub.name).write_text(stub.read_text(encoding="utf-8"), encoding="utf-8")
    assert check(tmp_path).returncode == 0
    (wire / "removed_pb2.py").write_text("")
    result = check(tmp_path)
    assert (result.returncode, "removed_pb2.py" in result.stderr) == (1, True)
    (wire / "removed_pb2.py").unlink()
    contract = tmp_path / "proto" / "baton" / "v1" / "inference.proto"
    contract.write_text(contract.read_text(encoding="utf-8").replace("int32 priority = 6", "int32 priority = 16"))
    result = check(tmp_path)
    assert (result.returncode, "inference_pb2.py" in result.stderr) == (1, True)


def test_descriptors_have_the_contracts_names() -> None:
    assert pb.DESCRIPTOR.name == "baton/v1/inference.proto"
    assert pb.DESCRIPTOR.package == "baton.v1"
    service = pb.DESCRIPTOR.services_by_name["Inference"]
    assert [method.name for method in service.methods] == [
        "Generate",
        "Tokenize",
        "Detokenize",
        "ListModels",
        "GetStatus",
    ]
    assert [method.server_streaming for method in service.methods] == [True, False, False, False, False]
    assert inference_pb2_grpc.InferenceStub


def test_proto_is_not_ours_to_import() -> None:
    assert not list((ROOT / "proto").rglob("__init__.py"))
    found = importlib.util.find_spec("proto")
    assert found is not None
    assert found.origin is not None
    assert not Path(found.origin).is_relative_to(ROOT / "proto")


def test_every_field_value_and_method_is_documented() -> None:
    lines = PROTO.splitlines()
    declared = re.compile(r"^\s*(?:(?:repeated |optional )?[\w.]+ \w+ = \d+;|rpc |[A-Z_]+ = \d+;|oneof )")
    undocumented = [
        line.strip()
        for before, line in itertools.pairwise(lines)
        if declared.match(line) and not line.startswith(("syntax", "package")) and not before.strip().startswith("//")
    ]
    assert not undocumented


def test_status_carries_the_whole_load() -> None:
    assert [field.name for field in pb.Load.DESCRIPTOR.fields] == [field.name for field in dataclasses.fields(Load)]
    seconds = {field.name for field in pb.Load.DESCRIPTOR.fields if field.type == FieldDescriptor.TYPE_DOUBLE}
    assert seconds == {name for name in Load.__annotations__ if name.endswith("_s")}
    counts = [field for field in pb.Load.DESCRIPTOR.fields if field.name not in seconds]
    assert {field.type for field in counts} == {FieldDescriptor.TYPE_INT64}


def test_the_ledgers_stages_are_those_documented() -> None:
    documented = re.search(r"// One of: ([a-z, ]+)\.\n\s*string name", PROTO)
    assert documented is not None
    assert tuple(documented[1].split(", ")) == STAGES
