"""zstd over bytes whose size both ends know.

Quantised values and exponents repeat only by chance. Level 1 takes such chances as matches, which costs time and more
bits than it saves: with the longest minimal match and the smallest table, which leave nearly all of the work to zstd's
Huffman stage, it is 7 % smaller and encodes nearly three times as fast on exponents (docs/adr/0008-codec-ladder.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtransfer.codecs.block import CodecError, Words

if TYPE_CHECKING:  # else only by who compresses: kernels are tried on machines that have little more than torch
    import zstandard


def literals() -> zstandard.ZstdCompressionParameters:
    """Parameters for bytes that repeat only by chance."""
    import zstandard

    return zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6, window_log=17)


class Entropy:
    """One thread's compressor and decompressor. Bytes that would not shrink are stored as they are."""

    def __init__(self) -> None:
        import zstandard

        self._compressor = zstandard.ZstdCompressor(compression_params=literals())
        self._decompressor = zstandard.ZstdDecompressor()

    def size(self, plain: Words) -> int:
        """Bytes that ``plain`` takes compressed."""
        return len(self._compressor.compress(plain.data))

    def pack(self, plain: Words, into: memoryview) -> int:
        """Writes ``plain`` to ``into``, which has room for it uncompressed, and returns the size."""
        packed = self._compressor.compress(plain.data)
        body = packed if len(packed) < plain.nbytes else plain.data.cast("B")
        into[: len(body)] = body
        return len(body)

    def unpack(self, body: memoryview, nbytes: int) -> memoryview:
        """The ``nbytes`` that were packed to ``body``. Raises :class:`CodecError`."""
        if len(body) == nbytes:
            return body
        import zstandard

        try:
            # The frame's own claim decides what zstd would allocate, so it is read first.
            claimed = zstandard.frame_content_size(body)
            if len(body) > nbytes or claimed != nbytes:
                raise CodecError(f"a frame of {claimed} bytes in {len(body)}, expected {nbytes}")
            return memoryview(self._decompressor.decompress(body, allow_extra_data=False))
        except zstandard.ZstdError as error:
            raise CodecError(f"zstd: {error}") from None
