"""Codecs on arbitrary bit patterns and arbitrary bytes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.config_handoff import CODECS
from baton.layout import KVLayout
from kvtransfer.arena import HostMemory
from kvtransfer.codecs import CodecError, make_codec
from kvtransfer.codecs.even import EVEN, EvenCodec
from kvtransfer.codecs.planes import NumpyPlanes, choose_planes
from kvtransfer.codecs.quantised import LADDER, QuantisedCodec
from kvtransfer.codecs.reference import TorchQuantiser

layouts = st.builds(
    KVLayout,
    model=st.just("m"),
    layers=st.just(1),
    kv_heads=st.integers(1, 4),
    head_dim=st.sampled_from([1, 2, 8, 31, 64, 80, 96, 128]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)


@st.composite
def blocks(draw, *, finite: bool = False):
    """A layout with keys and values of random bits, of repeated bits, or of KV-like values."""
    layout = draw(layouts)
    count = draw(st.integers(1, 40) | st.integers(120, 140))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (2, count, layout.kv_heads, layout.head_dim)
    word, signed, dtype = (
        (np.uint32, np.int32, torch.float32) if layout.dtype == "float32" else (np.uint16, np.int16, torch.bfloat16)
    )
    kind = draw(st.sampled_from(["normal", "tiny", "huge"] if finite else ["bits", "same", "normal", "strided"]))
    if kind in ("bits", "same"):
        bits = random.integers(0, np.iinfo(word).max, size=shape if kind == "bits" else (1,), dtype=word, endpoint=True)
        both = torch.from_numpy(np.broadcast_to(bits, shape).copy().view(signed)).view(dtype)
    else:
        scale = {"normal": 1.0, "strided": 1.0, "tiny": 1e-40, "huge": 1e37}[kind]
        both = torch.from_numpy(random.standard_normal(shape) * scale).to(dtype)
    if kind == "strided":  # as gathered from pages, or a slice of something larger
        both = both.repeat_interleave(2, dim=1)[:, ::2]
    return layout, both[0], both[1]


def encode(name, layout, keys, values, **place):
    codec = make_codec(name, layout)
    bound = codec.bound(keys.shape[0])
    memory = HostMemory(bound + 64)
    memory.view(bound, 64)[:] = b"\xa5" * 64
    nbytes = codec.encode(keys, values, memory.view(0, bound), **place)
    assert 0 < nbytes <= bound
    assert bytes(memory.view(bound, 64)) == b"\xa5" * 64
    return codec, memory.view(0, nbytes)


@settings(max_examples=150, deadline=None)
@given(blocks(), st.sampled_from(["raw", "lossless"]))
def test_exact_codecs_return_every_bit(block, name):
    layout, keys, values = block
    codec, data = encode(name, layout, keys, values)
    word = torch.int32 if layout.dtype == "float32" else torch.int16
    for got, want in zip(codec.decode(data, keys.shape[0]), (keys, values), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got.contiguous().view(word), want.contiguous().view(word))


@settings(max_examples=150, deadline=None)
@given(blocks(finite=True))
def test_int8_stays_within_half_a_step(block):
    layout, keys, values = block
    codec, data = encode("int8", layout, keys, values)
    group = next(size for size in range(min(64, layout.head_dim), 0, -1) if layout.head_dim % size == 0)
    rounding = 2.0**-8 if layout.dtype == "bfloat16" else 2.0**-22
    for got, want in zip(codec.decode(data, keys.shape[0]), (keys, values), strict=True):
        exact = want.double().reshape(-1, group)
        largest = exact.abs().amax(dim=1, keepdim=True)
        step = largest / 127 * (1 + 2.0**-7) + 2.0**-133  # one bfloat16 step above, the last one subnormal
        error = (got.double().reshape(-1, group) - exact).abs()
        assert bool((error <= step / 2 + largest * rounding).all())


@settings(max_examples=200, deadline=None)
@given(blocks(), st.sampled_from(CODECS), st.data())
def test_mutilated_bytes_are_refused_or_decode_to_the_right_shape(block, name, data):
    layout, keys, values = block
    count = keys.shape[0]
    try:
        codec, body = encode(name, layout, keys, values)
    except CodecError:
        return  # lossy, and values that are not finite
    mutilated = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(mutilated) - 1, 40) if name == "lossless" else len(mutilated) - 1))
        mutilated[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 8))
    mutilated = mutilated[: len(mutilated) - cut] + data.draw(st.binary(max_size=8))
    try:
        decoded = codec.decode(memoryview(mutilated), count)
    except CodecError:
        return
    assert [tensor.shape for tensor in decoded] == [keys.shape] * 2


@settings(max_examples=200, deadline=None)
@given(layouts, st.integers(1, 40), st.sampled_from(CODECS), st.binary(max_size=300))
def test_arbitrary_bytes_never_crash_a_decoder(layout, count, name, body):
    try:
        keys, values = make_codec(name, layout).decode(memoryview(bytearray(body)), count)
    except CodecError:
        return
    assert keys.shape == values.shape == (count, layout.kv_heads, layout.head_dim)


@st.composite
def places(draw):
    return {"before": draw(st.integers(0, 2)), "after": draw(st.sampled_from([0, 1, 100, 1000]))}


def codec_with(quantiser, name, layout):
    if name in EVEN:
        return EvenCodec(name, EVEN[name], layout, quantiser)
    return QuantisedCodec(name, LADDER[name], layout, compress=False, quantiser=quantiser)


@settings(max_examples=200, deadline=None)
@given(blocks(finite=True), places(), st.sampled_from(sorted([*LADDER, *EVEN])))
def test_compiled_loops_equal_plain_torch(block, place, name):
    layout, keys, values = block
    count, seen = keys.shape[0], []
    for quantiser in (TorchQuantiser(), None):
        codec = codec_with(quantiser, name, layout)
        room = memoryview(bytearray(codec.bound(count)))
        data = room[: codec.encode(keys, values, room, **place)]
        seen.append((bytes(data), *(tensor.clone() for tensor in codec.decode(data, count))))
    (plain, *want), (fast, *got) = seen
    assert plain == fast
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


@settings(max_examples=100, deadline=None)
@given(blocks())
def test_compiled_planes_equal_numpys(block):
    layout, keys, _ = block
    word = torch.int32 if layout.dtype == "float32" else torch.int16
    words = keys.contiguous().view(word).numpy()
    words = words.view(words.dtype.str.replace("i", "u"))
    plain, fast = NumpyPlanes(words.itemsize), choose_planes(words.itemsize)
    split = []
    for planes in (plain, fast):
        parts = [np.empty(words.size, dtype) for dtype in planes.dtypes]
        planes.split(words, parts)
        joined = np.empty(words.size, words.dtype)
        planes.join(parts, joined)
        assert np.array_equal(joined.reshape(words.shape[1], words.shape[0], -1), words.transpose(1, 0, 2))
        split.append(parts)
    for mine, theirs in zip(*split, strict=True):
        assert np.array_equal(mine, theirs)


@settings(max_examples=150, deadline=None)
@given(
    blocks(finite=True),
    places(),
    st.sampled_from([name for name in CODECS if name.removesuffix("-zstd") in LADDER and name not in EVEN]),
)
def test_the_prompts_ends_are_exact_and_the_rest_is_within_half_a_step(block, place, name):
    layout, keys, values = block
    level = LADDER[name.removesuffix("-zstd")]
    codec, data = encode(name, layout, keys, values, **place)
    count = keys.shape[0]
    first = min(count, max(0, level.sinks - place["before"]))
    last = min(count - first, max(0, level.window - place["after"]))
    for got, want, grid in zip(codec.decode(data, count), (keys, values), (level.keys, level.values), strict=True):
        assert torch.equal(got[:first], want[:first])
        assert torch.equal(got[count - last :], want[count - last :])
        inner, exact = (tensor[first : count - last].double() for tensor in (got, want))
        if not inner.numel():
            continue
        largest = exact.abs().amax(dim=0, keepdim=True) if grid.tokens else exact.abs().amax(dim=-1, keepdim=True)
        # Half a step of a group is at most its range over the levels; bfloat16 rounds scale, middle and result.
        share = 1 / 16 if grid.e4m3 else 1 / grid.top
        assert bool(((inner - exact).abs() <= largest * (share * (1 + 2.0**-6) + 2.0**-7) + 2.0**-132).all())


@settings(max_examples=150, deadline=None)
@given(blocks(finite=True), places(), st.sampled_from(sorted(EVEN)))
def test_even_steps_err_by_half_of_one(block, place, name):
    layout, keys, values = block
    codec, data = encode(name, layout, keys, values, **place)
    first = min(keys.shape[0], max(0, 1 - place["before"]))
    got_keys, got_values = codec.decode(data, keys.shape[0])
    assert torch.equal(got_keys[:first], keys[:first])
    assert torch.equal(got_values[:first], values[:first])
    got, exact = (tensor[first:].double() for tensor in (got_keys, keys))
    if not exact.numel():
        return
    # A step is at most the widest channel's half range over the resolution; bfloat16 rounds step, middle and result.
    widest = exact.abs().amax(dim=(0, 2), keepdim=True)
    share = 0.5 / min(EVEN[name].resolution, 127.0)
    assert bool(((got - exact).abs() <= widest * (share * (1 + 2.0**-6) + 2.0**-7) + 2.0**-132).all())
    got, exact = (tensor[first:].double() for tensor in (got_values, values))
    largest = exact.abs().amax(dim=-1, keepdim=True)
    share = 1 / EVEN[name].values.top
    assert bool(((got - exact).abs() <= largest * (share * (1 + 2.0**-6) + 2.0**-7) + 2.0**-132).all())


@settings(max_examples=60, deadline=None)
@given(layouts, st.integers(1, 300), places(), st.sampled_from(sorted(LADDER)))
def test_sizes_are_as_announced(layout, count, place, name):
    random = torch.Generator().manual_seed(count)
    dtype = torch.float32 if layout.dtype == "float32" else torch.bfloat16
    both = torch.randn(2, count, layout.kv_heads, layout.head_dim, generator=random).to(dtype)
    _, plain = encode(name, layout, both[0], both[1], **place)
    level, size = LADDER[name], (layout.kv_heads, layout.head_dim)
    first = min(count, max(0, level.sinks - place["before"]))
    last = min(count - first, max(0, level.window - place["after"]))
    rest = count - first - last
    want = 4 * (level.sinks + level.window > 0) + (first + last) * layout.layer_token_bytes
    for grid in (level.keys, level.values):
        want += 2 * (grid.groups(rest, *size) + grid.middles(rest, *size)) + grid.level_bytes(rest, *size)
    assert len(plain) == want
    if f"{name}-zstd" not in EVEN:
        assert len(encode(f"{name}-zstd", layout, both[0], both[1], **place)[1]) <= want
