"""Configuration: valid input is taken as it is, wrong input is named by its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.config import Config, load, parse
from baton.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "baton.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_no_file_and_an_empty_file_are_the_defaults(tmp_path: Path) -> None:
    assert load(None) == load(write(tmp_path, "")) == Config()


def test_a_file_sets_what_it_names(tmp_path: Path) -> None:
    config = load(write(tmp_path, "prefill: {replicas: 3}\nhandoff:\n  codec: int8\n  quality_floor: int8\n"))
    assert config.prefill.replicas == 3
    assert config.handoff.codec == "int8"
    assert config.decode == Config().decode


def test_the_tree_of_a_configuration_gives_it_again() -> None:
    config = parse(
        {"name": "x-1", "decode": {"replicas": 2, "resources": {"decode_node": 1}}, "ingress": {"grpc_port": 9100}}
    )
    assert parse(config.model_dump()) == config


@pytest.mark.parametrize(
    ("tree", "field", "message"),
    [
        ({"prefil": {}}, "prefil", "unknown key; allowed here: name, worker_host, model, prefill, decode"),
        ({"prefill": {"replica": 2}}, "prefill.replica", "allowed here: replicas, tensor_parallel"),
        ({"prefill": {"replicas": -1}}, "prefill.replicas", "greater than or equal to 0; got -1"),
        ({"prefill": {"replicas": "two"}}, "prefill.replicas", "got 'two'"),
        ({"prefill": {"replicas": 1.5}}, "prefill.replicas", "got 1.5"),
        ({"prefill": []}, "prefill", "dictionary"),
        ({"decode": {"replicas": 0}}, "(top level)", "decode.replicas must be at least 1"),
        ({"decode": {"page_tokens": 2048}}, "decode.page_tokens", "less than or equal to 1024; got 2048"),
        ({"decode": {"kv_tokens": 8}}, "decode", "less than one page of 16 tokens"),
        ({"decode": {"kv_tokens": 1024}}, "(top level)", "cannot hold one model.max_context of 2048"),
        ({"decode": {"cpus": 0}}, "decode.cpus", "greater than 0"),
        (
            {"handoff": {"transport": "carrier"}},
            "handoff.transport",
            "'tcp', 'gloo', 'nccl' or 'loopback'; got 'carrier'",
        ),
        ({"handoff": {"transport": "tcp", "tls": {"cert": "c.pem"}}}, "handoff.tls", "missing: key, ca"),
        (
            {"handoff": {"transport": "nixl", "tls": {"cert": "c", "key": "k", "ca": "a"}}},
            "handoff",
            "tls protects transport tcp only, and transport is nixl",
        ),
        ({"handoff": {"codec": "int8"}}, "handoff", "set quality_floor: int8"),
        ({"handoff": {"lease_s": float("nan")}}, "handoff.lease_s", "got nan"),
        ({"handoff": {"lease_s": float("inf")}}, "handoff.lease_s", "got inf"),
        ({"handoff": {"stall_s": 0}}, "handoff.stall_s", "greater than 0"),
        ({"ingress": {"grpc_port": 0}}, "ingress.grpc_port", "greater than or equal to 1"),
        ({"ingress": {"http_port": 65536}}, "ingress.http_port", "65535"),
        ({"name": "Not A Name"}, "name", "pattern"),
        ({"model": {"id": ""}}, "model.id", "at least 1 character"),
        ({"model": None}, "model", ""),
    ],
)
def test_wrong_values_name_their_key_and_what_is_allowed(tree: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(tree, source="baton.yaml")
    assert refused.value.field == field
    assert message in refused.value.message
    assert "[baton.yaml]" in refused.value.message


def test_several_errors_are_counted() -> None:
    with pytest.raises(ConfigError, match=r"and 2 more"):
        parse({"nonsense": 1, "prefill": {"replicas": -1, "cpus": -1}})


@pytest.mark.parametrize("tree", [None, [], "text", 3])
def test_only_a_mapping_is_a_configuration(tree: Any) -> None:
    with pytest.raises(ConfigError, match="must be a mapping"):
        parse(tree)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"prefill: [", "is not YAML"), (b"\xff\xfe\x00", "is not YAML"), (b"- a\n- b\n", "must be a mapping")],
)
def test_files_that_are_no_configuration(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_yaml_cannot_build_objects(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not YAML"):
        load(write(tmp_path, "name: !!python/object/apply:os.getcwd []"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none.yaml: No such file"):
        load(tmp_path / "none.yaml")


def test_flags_override_and_none_leaves_alone() -> None:
    base = parse({"prefill": {"replicas": 4}})
    changed = base.with_flags({"decode.replicas": 2, "prefill.replicas": None, "name": "other"})
    assert (changed.prefill.replicas, changed.decode.replicas, changed.name) == (4, 2, "other")
    assert base.decode.replicas == 1


def test_flags_are_validated_like_the_file() -> None:
    with pytest.raises(ConfigError) as refused:
        Config().with_flags({"handoff.transport": "carrier"})
    assert refused.value.field == "handoff.transport"


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().name = "other"


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.dictionaries(
        st.sampled_from([*Config.model_fields, "replicas", "codec", "id"]), inner, max_size=4
    ),
    max_leaves=8,
)


@given(TREES)
def test_any_tree_is_a_configuration_or_a_config_error(tree: Any) -> None:
    try:
        config = parse(tree)
    except ConfigError:
        return
    assert parse(config.model_dump()) == config
