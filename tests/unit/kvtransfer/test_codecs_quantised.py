from __future__ import annotations

import struct

import pytest
import torch
import zstandard

from baton.config_handoff import CODECS
from baton.layout import KVLayout
from kvtransfer.codecs import CodecError, make_codec, native
from kvtransfer.codecs.even import CLASSES
from kvtransfer.codecs.grid import Grid, packed_bytes
from kvtransfer.codecs.quantised import LADDER
from kvtransfer.codecs.quantiser import choose_quantiser
from kvtransfer.codecs.reference import TorchQuantiser, pack, unpack
from kvtransfer.protocol import GROUP_TOKENS, block_tokens

FLOAT = KVLayout("m", 1, 3, 64, "float32")
BRAIN = KVLayout("m", 1, 2, 128, "bfloat16")
LOSSY = [name for name in CODECS if name not in ("raw", "lossless")]


def tensors(layout, count):
    dtype = torch.float32 if layout.dtype == "float32" else torch.bfloat16
    random = torch.Generator().manual_seed(count)
    return [torch.randn(count, layout.kv_heads, layout.head_dim, generator=random).to(dtype) for _ in "kv"]


def encode(name, layout, keys, values, **place):
    codec = make_codec(name, layout)
    room = bytearray(codec.bound(keys.shape[0]))
    return room[: codec.encode(keys, values, memoryview(room), **place)]


def bits(name, layout, count=640):
    """Of a block in the middle of a prompt."""
    keys, values = tensors(layout, count)
    body = encode(name, layout, keys, values, before=count, after=count)
    return 8 * len(body) / (2 * keys.numel())


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("int8", 8.25),
        ("fp8", 8.25),
        ("int6", 6.26),
        ("int4", 4.26),
        ("int2", 2.63),
        ("int6-zstd", 5.9),
        ("int4-zstd", 4.4),
        ("int3-zstd", 3.6),
        ("int2-zstd", 2.8),
    ],
)
def test_bits_of_a_value_with_scales_and_header(name, most):
    assert bits(name, FLOAT) <= most
    assert bits(name, BRAIN) <= most


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_entropy_coding_changes_the_size_alone(name):
    keys, values = tensors(FLOAT, 300)
    plain, packed = (encode(codec, FLOAT, keys, values) for codec in (name, f"{name}-zstd"))
    assert len(packed) < len(plain)
    for mine, theirs in zip(
        make_codec(name, FLOAT).decode(memoryview(plain), 300),
        make_codec(f"{name}-zstd", FLOAT).decode(memoryview(packed), 300),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 2.0**127])
def test_what_would_not_decode_finite_is_refused(name, value):
    keys, values = tensors(FLOAT, 400)
    for tensor, at in ((keys, 200), (values, 100)):
        spoiled = tensor.clone()
        spoiled[at, 1, 5] = value
        with pytest.raises(CodecError, match="not finite"):
            encode(name, FLOAT, *((spoiled, values) if tensor is keys else (keys, spoiled)))


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("value", [0.0, 1.7e38, -1.7e38, 1e-45])
def test_constant_blocks_stay_finite(name, value):
    keys = torch.full((140, 3, 64), value)
    got = make_codec(name, FLOAT).decode(memoryview(encode(name, FLOAT, keys, keys)), 140)
    for tensor in got:
        assert torch.allclose(tensor, keys, rtol=0.7 if name.startswith("int2") else 0.13, atol=1e-38)


@pytest.mark.parametrize("name", ["int4", "int2"])
def test_only_the_prompts_own_ends_are_kept(name):
    keys, values = tensors(FLOAT, 300)
    level = LADDER[name.removesuffix("-zstd")]
    whole = encode(name, FLOAT, keys, values)
    assert struct.unpack_from("<HH", whole) == (level.sinks, level.window)
    got = make_codec(name, FLOAT).decode(memoryview(whole), 300)[0]
    assert torch.equal(got[0], keys[0])
    assert torch.equal(got[300 - level.window :], keys[300 - level.window :])
    assert not torch.equal(got[1 : 300 - level.window], keys[1 : 300 - level.window])
    assert struct.unpack_from("<HH", encode(name, FLOAT, keys, values, before=1, after=128)) == (0, 0)
    assert struct.unpack_from("<HH", encode("int2", FLOAT, keys, values, before=0, after=100)) == (1, 28)


def test_a_block_inside_the_window_is_exact():
    keys, values = tensors(FLOAT, 20)
    got = make_codec("int2", FLOAT).decode(memoryview(encode("int2", FLOAT, keys, values)), 20)
    assert torch.equal(got[0], keys)
    assert torch.equal(got[1], values)


@pytest.mark.parametrize("head", [(2, 0), (0, 1), (1, 4), (0xFFFF, 0xFFFF)])
def test_a_header_that_keeps_too_much_is_refused(head):
    body = encode("int4", FLOAT, *tensors(FLOAT, 4))
    struct.pack_into("<HH", body, 0, *head)
    with pytest.raises(CodecError, match="keeps"):
        make_codec("int4", FLOAT).decode(memoryview(body), 4)


@pytest.mark.parametrize("name", ["int8-zstd", "int4-zstd"])
def test_levels_that_claim_too_much_are_refused_before_they_are_unpacked(name):
    keys, values = tensors(FLOAT, 128)
    body = encode(name, FLOAT, keys, values, before=1)
    at = body.rindex(b"\x28\xb5\x2f\xfd")
    planted = body[:at] + zstandard.ZstdCompressor().compress(bytes(1 << 26))
    with pytest.raises(CodecError, match="frame of 67108864 bytes"):
        make_codec(name, FLOAT).decode(memoryview(planted), 128)


def spread_keys(count):
    """Channels of one head from constant to a thousand times the narrowest."""
    widths = torch.logspace(-2, 1, 64)
    widths[5] = 0.0
    random = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 64, generator=random) * widths + 3.0


def test_channels_of_a_head_share_a_step_and_are_compressed_by_their_spread():
    keys, values = spread_keys(600), tensors(FLOAT, 600)[1]
    body = encode("int4-zstd", FLOAT, keys, values, before=1)
    got, _ = make_codec("int4-zstd", FLOAT).decode(memoryview(body), 600)
    error = (got - keys).abs().amax(dim=0)  # [heads, head_dim]: half a step where a channel is wider than that
    wide = error[:, 24:]
    assert bool((wide > wide.amax(dim=1, keepdim=True) * 0.9).all())
    at = 4 + 2 * (3 + 3 * 64 + 3 * 600)
    classes = torch.tensor(list(body[at : at + 3 * 64])).view(3, 64)
    assert classes.min() == 0
    assert classes.max() == CLASSES - 1
    assert bool((classes[:, 8:].diff(dim=1) >= -1).all())
    sizes = struct.unpack_from("<" + "IB" * CLASSES, body, at + 3 * 64)[::2]
    assert [size > 0 for size in sizes] == [index in classes for index in range(CLASSES)]


@pytest.mark.parametrize(("field", "value"), [(0, 8), (1, 0), (1, 1 << 31), (2, 128), (3, 0x7F80), (4, 0x7F80)])
def test_even_blocks_that_no_encoder_writes_are_refused(field, value):
    """A class that is none, a class without bytes or with too many, a level too far, infinite steps and middles."""
    body = encode("int4-zstd", FLOAT, spread_keys(40), tensors(FLOAT, 40)[1], before=1)
    classes = 4 + 2 * (3 + 3 * 64 + 3 * 40)
    table = classes + 3 * 64
    place, form = {0: (classes, "<B"), 1: (table, "<I"), 2: (table + 4, "<B"), 3: (4, "<H"), 4: (10, "<H")}[field]
    struct.pack_into(form, body, place, value)
    with pytest.raises(CodecError):
        make_codec("int4-zstd", FLOAT).decode(memoryview(body), 40)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("layout", [FLOAT, BRAIN])
def test_products_that_overflow_are_refused(name, layout):
    """Every scale the largest finite one."""
    keys, values = tensors(layout, 300)
    body = encode(name, layout, keys, values, before=1, after=128)
    start = 4 if name.startswith("int") and name[:4] != "int8" else 0
    body[start : start + 6] = b"\x7f\x7f" * 3
    with pytest.raises(CodecError, match="finite"):
        make_codec(name, layout).decode(memoryview(body), 300)


@pytest.mark.parametrize("quantiser", [TorchQuantiser(), choose_quantiser()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_that_overflows_in_one_value_alone_is_refused(quantiser, dtype):
    grid = LADDER["int4"].values
    levels = torch.full((32,), 0x77, dtype=torch.uint8).numpy()  # all zero
    scale = torch.tensor([0x7E7F], dtype=torch.int16).numpy().view("<u2")  # a quarter of the largest
    out = torch.empty(1, 1, 64, dtype=dtype)
    quantiser.dequantise(grid, scale, scale[:0], levels, out)
    assert not out.any()
    levels[31] = 0xE7
    with pytest.raises(CodecError, match="finite"):
        quantiser.dequantise(grid, scale, scale[:0], levels, out)


@pytest.mark.parametrize("name", ["int4", "int2"])
@pytest.mark.parametrize("quantiser", [TorchQuantiser(), choose_quantiser()])
@pytest.mark.parametrize(("word", "part"), [(0x7F80, 0), (0x8000, 0), (0xBF80, 0), (0x7F80, 1), (0xFFC0, 1)])
def test_scales_and_middles_that_are_never_written_are_refused(name, quantiser, word, part):
    grid = LADDER[name].keys
    size = grid.groups(4, 1, 8), grid.middles(4, 1, 8), grid.level_bytes(4, 1, 8)
    scales, middles, levels = (torch.zeros(n, dtype=torch.uint8).numpy() for n in (2 * size[0], 2 * size[1], size[2]))
    words = scales.view("<u2"), middles.view("<u2")
    words[part][3] = word
    with pytest.raises(CodecError, match="scale"):
        quantiser.dequantise(grid, *words, levels, torch.empty(1, 4, 8))


@pytest.mark.parametrize("quantiser", [TorchQuantiser(), choose_quantiser()])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_fp8_refuses_levels_that_are_not_numbers(quantiser, code):
    levels = torch.zeros(8, dtype=torch.uint8).numpy()
    levels[5] = code
    scale = torch.zeros(2, dtype=torch.uint8).numpy().view("<u2")
    with pytest.raises(CodecError, match="not a finite number"):
        quantiser.dequantise(LADDER["fp8"].values, scale, scale[:0], levels, torch.empty(1, 1, 8))


def test_every_e4m3_value_is_what_torch_makes_of_it():
    every = torch.arange(256, dtype=torch.uint8)
    every = every[(every & 0x7F) != 0x7F].view(torch.float8_e4m3fn).float()
    # Halves between neighbours too: ties go to even.
    x = torch.cat((every, (every[1:] + every[:-1]) / 2)).repeat(2)[:512].view(8, 1, 64)
    grid = LADDER["fp8"].values
    found = []
    for quantiser in (TorchQuantiser(), choose_quantiser()):
        scales = torch.zeros(2 * grid.groups(8, 1, 64), dtype=torch.uint8).numpy().view("<u2")
        levels = torch.zeros(512, dtype=torch.uint8).numpy()
        quantiser.quantise(x, grid, scales, scales[:0], levels)
        found.append((scales.tobytes(), levels.tobytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize("width", [2, 4, 6, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 64, 129])
def test_packed_levels_come_back(width, count):
    levels = torch.randint(0, 1 << width, (count,), dtype=torch.uint8)
    packed = pack(levels, width)
    assert packed.shape == (packed_bytes(count, width),)
    assert torch.equal(unpack(packed, count, width), levels)


def test_groups_of_a_head_divide_it():
    assert [Grid(4, 14).group(head_dim) for head_dim in (31, 64, 80, 96, 128)] == [31, 64, 40, 48, 64]


def test_blocks_end_with_whole_groups_where_they_can():
    for layout in (FLOAT, BRAIN):
        assert block_tokens(layout) % GROUP_TOKENS == 0
    huge = KVLayout("m", 1, 64, 256, "float32")
    assert block_tokens(huge) == (1 << 20) // huge.layer_token_bytes < GROUP_TOKENS


def test_without_a_compiler_the_codecs_still_run(monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    native.load.cache_clear()
    try:
        assert isinstance(choose_quantiser(), TorchQuantiser)
        assert "no C++ compiler" in caplog.text
    finally:
        native.load.cache_clear()
