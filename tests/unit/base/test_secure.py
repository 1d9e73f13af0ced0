"""The cluster key, the handshake and sealed frames, as values; sockets are in ``test_guard.py``."""

from __future__ import annotations

import pickle
import stat
from pathlib import Path

import pytest

from baton.config_security import SecurityConfig
from baton.errors import ConfigError
from baton.messages import PLANE
from baton.secure import HELLO_BYTES, ClusterKey, Handshake, Seal, Untrusted, load_key, require_key, write_key

KEY = ClusterKey("k" * 40)
RECORDS = PLANE.fingerprint


def shake(
    connecting_key: ClusterKey = KEY, accepting_key: ClusterKey = KEY
) -> tuple[tuple[Seal, Seal], tuple[Seal, Seal]]:
    """Both ends' seals, or the error of the one that refuses first."""
    near = Handshake(connecting_key, RECORDS, accepts=False)
    far = Handshake(accepting_key, RECORDS, accepts=True)
    far.meet(near.hello)
    near.meet(far.hello)
    return near.check(far.proof), far.check(near.proof)


def test_both_ends_agree_and_frames_open_in_order_in_both_directions() -> None:
    (near_out, near_in), (far_out, far_in) = shake()
    for index in range(300):
        body = bytes([index % 256]) * index
        assert far_in.open(near_out.close(body)) == body
        assert near_in.open(far_out.close(body)) == body


def test_a_sealed_frame_does_not_show_its_body() -> None:
    (out, _), _ = shake()
    assert b"a secret prompt" not in out.close(b"a secret prompt")


def test_another_key_is_refused_by_whoever_checks() -> None:
    with pytest.raises(Untrusted, match="another cluster key"):
        shake(connecting_key=ClusterKey("x" * 40))


@pytest.mark.parametrize("at", range(HELLO_BYTES))
def test_every_byte_of_a_hello_is_bound(at: int) -> None:
    """A hello changed on its way is refused at once, or the proofs differ: nobody talks on."""
    near, far = Handshake(KEY, RECORDS, accepts=False), Handshake(KEY, RECORDS, accepts=True)
    changed = bytearray(near.hello)
    changed[at] ^= 1
    with pytest.raises(Untrusted):  # noqa: PT012  the refusal may come at either step
        far.meet(bytes(changed))
        near.meet(far.hello)
        near.check(far.proof)


def test_a_proof_sent_back_to_its_sender_proves_nothing() -> None:
    near, far = Handshake(KEY, RECORDS, accepts=False), Handshake(KEY, RECORDS, accepts=True)
    far.meet(near.hello)
    near.meet(far.hello)
    with pytest.raises(Untrusted, match="another cluster key"):
        near.check(near.proof)
    with pytest.raises(Untrusted, match="another cluster key"):
        far.check(far.proof)


def test_a_hello_sent_back_to_its_sender_is_refused() -> None:
    near = Handshake(KEY, RECORDS, accepts=False)
    with pytest.raises(Untrusted, match="our own side"):
        near.meet(near.hello)


def test_a_recorded_handshake_opens_no_second_connection() -> None:
    near, far, later = (Handshake(KEY, RECORDS, accepts=accepts) for accepts in (False, True, True))
    far.meet(near.hello)
    near.meet(far.hello)
    recorded = near.proof
    far.check(recorded)
    later.meet(near.hello)
    with pytest.raises(Untrusted, match="another cluster key"):
        later.check(recorded)


def test_other_records_are_refused() -> None:
    near, far = Handshake(KEY, b"12345678", accepts=False), Handshake(KEY, RECORDS, accepts=True)
    with pytest.raises(Untrusted, match="other records"):
        far.meet(near.hello)


@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31)])
def test_a_degenerate_ephemeral_key_is_refused(public: bytes) -> None:
    near, far = Handshake(KEY, RECORDS, accepts=False), Handshake(KEY, RECORDS, accepts=True)
    with pytest.raises(Untrusted, match="degenerate"):
        far.meet(near.hello[:-32] + public)


def test_a_frame_repeated_skipped_reordered_cut_or_grown_does_not_open() -> None:
    def fresh() -> tuple[list[bytes], Seal]:
        (out, _), (_, into) = shake()
        return [out.close(b"first"), out.close(b"second"), out.close(b"third")], into

    frames, into = fresh()
    into.open(frames[0])
    with pytest.raises(Untrusted, match="frame 1 is not the one"):
        into.open(frames[0])
    frames, into = fresh()
    with pytest.raises(Untrusted, match="frame 0"):
        into.open(frames[1])
    frames, into = fresh()
    into.open(frames[0])
    with pytest.raises(Untrusted):
        into.open(frames[2])
    for wrong in (b"", frames[0][:-1], frames[0] + b"\0", frames[0][:15]):
        _, into = fresh()
        with pytest.raises(Untrusted):
            into.open(wrong)


def test_a_frame_of_another_connection_or_direction_does_not_open() -> None:
    (out, back), (_, into) = shake()
    (other_out, _), _ = shake()
    with pytest.raises(Untrusted):
        into.open(other_out.close(b"spliced"))
    with pytest.raises(Untrusted):
        back.open(out.close(b"reflected"))


def test_a_key_shows_itself_nowhere() -> None:
    assert "k" * 8 not in repr(KEY)
    assert "k" * 8 not in str(KEY)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(KEY)
    with pytest.raises(ConfigError) as wrong:
        ClusterKey("tooshort-s3cret")
    assert "s3cret" not in str(wrong.value)
    assert "at least 32 characters, this one has 15" in str(wrong.value)


def test_derived_keys_differ_by_purpose_context_and_secret() -> None:
    derived = {
        KEY.derive("a", 32), KEY.derive("b", 32), KEY.derive("a", 32, context=b"c"), KEY.derive("a", 32, mixed=b"c"),
        ClusterKey("x" * 40).derive("a", 32),
    }  # fmt: skip
    assert len(derived) == 5
    assert KEY.derive("a", 32) == ClusterKey("k" * 40 + "\n").derive("a", 32)  # an editor's last newline is no secret


def test_a_written_key_is_this_users_and_loads(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    write_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    loaded = load_key(SecurityConfig(cluster_key_file=str(path)))
    assert loaded is not None
    assert loaded.derive("a", 16) == ClusterKey(path.read_text()).derive("a", 16)
    with pytest.raises(FileExistsError):
        write_key(path)


def test_the_file_comes_before_the_environment_and_nothing_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BATON_CLUSTER_KEY", raising=False)
    assert load_key(SecurityConfig()) is None
    monkeypatch.setenv("BATON_CLUSTER_KEY", "e" * 40)
    (tmp_path / "key").write_text("f" * 40)
    found = load_key(SecurityConfig()), load_key(SecurityConfig(cluster_key_file=str(tmp_path / "key")))
    assert [key and key.derive("a", 16) for key in found] == [
        ClusterKey("e" * 40).derive("a", 16), ClusterKey("f" * 40).derive("a", 16)
    ]  # fmt: skip
    monkeypatch.setenv("BATON_CLUSTER_KEY", "short")
    with pytest.raises(ConfigError, match="BATON_CLUSTER_KEY: a cluster key has at least"):
        load_key(SecurityConfig())


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "cannot read"), (b"\xff" * 40, "is not text"), (b"k" * 5000, "larger"), (b"", "32")]
)
def test_a_bad_key_file_is_named(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"security.cluster_key_file: .*{reason}"):
        load_key(SecurityConfig(cluster_key_file=str(path)))


def test_a_key_that_everybody_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "key"
    path.write_text("f" * 40)
    path.chmod(0o644)
    load_key(SecurityConfig(cluster_key_file=str(path)))
    assert "every user of this machine" in caplog.text
    assert "ffff" not in caplog.text


def test_without_a_key_a_cluster_starts_only_when_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATON_CLUSTER_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"security\.cluster_key_file: no cluster key"):
        require_key(SecurityConfig())
    assert require_key(SecurityConfig(allow_unauthenticated=True)) is None
