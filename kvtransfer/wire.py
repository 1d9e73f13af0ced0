"""What may cross from a sender of one dtype: how many tokens a block may have, and how many bytes."""

from __future__ import annotations

from baton.config_handoff import CODECS
from baton.layout import KVLayout
from kvtransfer.codecs import largest_block, make_codec
from kvtransfer.protocol import block_tokens


class Wire:
    """``layout``: the receiver's, with the sender's dtype. Blocks arrive in it and are converted when they land."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self._block_tokens = block_tokens(layout)
        self._codecs = {name: make_codec(name, layout) for name in CODECS}  # for their bounds; never encodes
        self.largest_block = largest_block(self._codecs.values(), layout)

    def bound(self, codec: str, count: int) -> int:
        """Most bytes that ``count`` tokens may take; 0 for an unknown codec or more tokens than a block may have."""
        known = self._codecs.get(codec)
        return known.bound(count) if known is not None and 0 < count <= self._block_tokens else 0
