from __future__ import annotations

import struct

import pytest
import torch
import zstandard

from baton.config_handoff import CODECS
from baton.layout import KVLayout
from kvtransfer.arena import HostMemory
from kvtransfer.codecs import CodecError, make_codec
from kvtransfer.protocol import block_digest

FLOAT = KVLayout("m", 1, 3, 64, "float32")
BRAIN = KVLayout("m", 1, 2, 128, "bfloat16")


def tensors(layout, count, scale=1.0):
    dtype = torch.float32 if layout.dtype == "float32" else torch.bfloat16
    random = torch.Generator().manual_seed(count)
    return [(scale * torch.randn(count, layout.kv_heads, layout.head_dim, generator=random)).to(dtype) for _ in "kv"]


def encode(name, layout, keys, values):
    codec = make_codec(name, layout)
    memory = HostMemory(codec.bound(keys.shape[0]))
    nbytes = codec.encode(keys, values, memory.view(0, memory.nbytes))
    return bytearray(memory.view(0, nbytes))


def test_raw_is_the_canonical_layout():
    keys, values = tensors(FLOAT, 5)
    body = encode("raw", FLOAT, keys, values)
    want = torch.stack((keys.transpose(0, 1), values.transpose(0, 1))).contiguous()
    assert bytes(body) == want.numpy().tobytes()


@pytest.mark.parametrize(("layout", "ratio"), [(FLOAT, 1.15), (BRAIN, 1.4)])
def test_lossless_shrinks_what_looks_like_kv(layout, ratio):
    keys, values = tensors(layout, 256)
    raw = 2 * keys.numel() * keys.element_size()
    assert raw / len(encode("lossless", layout, keys, values)) > ratio


def test_lossless_finds_the_empty_mantissa_of_upcast_values():
    keys, values = (tensor.bfloat16().float() for tensor in tensors(FLOAT, 256))
    assert 8 * keys.numel() / len(encode("lossless", FLOAT, keys, values)) > 2.6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 1e-45, 3.4e38])
@pytest.mark.parametrize("layout", [FLOAT, BRAIN])
@pytest.mark.parametrize("name", ["raw", "lossless"])
def test_every_bit_pattern_survives(name, layout, value):
    keys, values = tensors(layout, 3)
    keys[1], values[0, 0, :7] = value, value
    word = torch.int32 if layout.dtype == "float32" else torch.int16
    got = make_codec(name, layout).decode(memoryview(encode(name, layout, keys, values)), 3)
    for mine, theirs in zip(got, (keys, values), strict=True):
        assert torch.equal(mine.contiguous().view(word), theirs.view(word))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_int8_refuses_what_is_not_finite(value):
    keys, values = tensors(FLOAT, 3)
    values[2, 1, 5] = value
    with pytest.raises(CodecError, match="not finite"):
        encode("int8", FLOAT, keys, values)


def test_int8_takes_a_quarter_and_keeps_zeros():
    keys, values = torch.zeros(64, 3, 64), tensors(FLOAT, 64)[1]
    body = encode("int8", FLOAT, keys, values)
    assert 8 * keys.numel() / len(body) > 3.8
    assert not make_codec("int8", FLOAT).decode(memoryview(body), 64)[0].any()


@pytest.mark.parametrize("name", CODECS)
def test_another_shape_or_dtype_is_refused(name):
    keys, _ = tensors(FLOAT, 4)
    for wrong in (keys[:, :2], keys[:3], keys.bfloat16()):
        with pytest.raises(CodecError, match="expected"):
            encode(name, FLOAT, keys, wrong)


@pytest.mark.parametrize("name", CODECS)
def test_another_length_is_refused(name):
    keys, values = tensors(FLOAT, 4)
    body = encode(name, FLOAT, keys, values)
    codec = make_codec(name, FLOAT)
    for wrong, count in ((body[:-1], 4), (body + b"\0", 4), (body, 3), (body, 5), (b"", 4)):
        with pytest.raises(CodecError):
            codec.decode(memoryview(wrong), count)


def test_a_frame_that_claims_too_much_is_refused_before_it_is_unpacked():
    keys, values = tensors(FLOAT, 4)
    body = encode("lossless", FLOAT, keys, values)
    (size,) = struct.unpack_from("<I", body, 12 + 2 * 4)  # of the exponents, which come last
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))[:1000]
    planted = body[:-size] + bomb
    struct.pack_into("<I", planted, 12 + 2 * 4, len(bomb))
    with pytest.raises(CodecError, match=r"frame of 268435456 bytes in \d+, expected 1536"):
        make_codec("lossless", FLOAT).decode(memoryview(planted), 4)


def test_a_frame_without_its_size_is_refused():
    keys, values = tensors(FLOAT, 64)
    body = encode("lossless", FLOAT, keys, values)
    (size,) = struct.unpack_from("<I", body, 12 + 2 * 4)
    plane = zstandard.ZstdDecompressor().decompress(bytes(body[-size:]))
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(plane)
    planted = body[:-size] + silent
    struct.pack_into("<I", planted, 12 + 2 * 4, len(silent))
    with pytest.raises(CodecError, match="frame of -1 bytes"):
        make_codec("lossless", FLOAT).decode(memoryview(planted), 64)


@pytest.mark.parametrize(("at", "value"), [(8, 3), (8, 0), (8, 12), (12, 0), (12, 1 << 31), (16, 12287), (20, 1 << 31)])
def test_lossless_refuses_planes_that_it_never_writes(at, value):
    """Random float32: two stored planes of 24576 and 12288 bytes, then the exponents."""
    body = encode("lossless", FLOAT, *tensors(FLOAT, 32))
    assert struct.unpack_from("<IIII", body, 4) == (32, 4, 24576, 12288)
    struct.pack_into("<I", body, at, value)
    with pytest.raises(CodecError):
        make_codec("lossless", FLOAT).decode(memoryview(body), 32)


@pytest.mark.parametrize("scale", [b"\x80\x7f", b"\xc0\x7f", b"\x80\xbf"])  # inf, nan, -1
def test_int8_refuses_scales_that_it_never_writes(scale):
    body = encode("int8", FLOAT, *tensors(FLOAT, 2))
    body[:2] = scale
    with pytest.raises(CodecError, match="scale"):
        make_codec("int8", FLOAT).decode(memoryview(body), 2)


def test_the_digest_binds_where_the_bytes_belong():
    place = {
        "request_id": "r", "epoch": 1, "layout": "f", "layer": 2, "start": 3, "count": 4, "codec": "raw",
    }  # fmt: skip
    data = memoryview(bytearray(100))
    digests = {block_digest(data, **place), block_digest(data[:99], **place)}
    for name, value in place.items():
        digests.add(block_digest(data, **place | {name: value + 1 if isinstance(value, int) else value + "x"}))
    digests.add(block_digest(data, **place | {"start": 34, "count": 4}) + b"")
    data[50] = 1
    digests.add(block_digest(data, **place))
    assert len(digests) == 2 + 7 + 1 + 1
    assert {len(digest) for digest in digests} == {16}


def test_an_unknown_codec_has_no_object():
    with pytest.raises(ValueError, match="zip"):
        make_codec("zip", FLOAT)
