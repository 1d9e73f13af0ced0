"""A request in the engine: its tokens, the names of the pages they fill, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence

from baton.blocks import BlockChain
from baton.request import FinishReason, Work
from engine.prefix import PageName, chain
from engine.sampler import TokenCounts, counts_for


class Active:
    """``work`` and its tokens so far. ``salt`` begins the chain of page names; None: it stays out of the cache."""

    def __init__(self, work: Work, page_tokens: int, salt: bytes | None) -> None:
        self.work = work
        self.tokens: list[int] = []  # prompt and output
        self.counts: TokenCounts | None = counts_for(work.sampling, work.prompt, work.output)
        self._page_tokens = page_tokens
        self._key = salt  # of the last full page
        self._blocks = BlockChain()
        self.keys = self._extend(work.known)  # of the full pages of all that is known at the beginning

    @property
    def outputs(self) -> int:
        return len(self.tokens) - len(self.work.prompt)

    def append(self, token: int) -> PageName | None:
        """A new output token. The name of the page that it fills, if it does."""
        if self.counts is not None:
            self.counts.add(token)
        keys = self._extend((token,))
        return keys[0] if keys else None

    def finish(self) -> FinishReason | None:
        """Why the sequence ends with its newest token, or None."""
        sampling = self.work.sampling
        newest = self.tokens[-1]
        if newest in sampling.eos_token_ids or newest in sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.outputs >= sampling.max_tokens else None

    def _extend(self, tokens: Sequence[int]) -> tuple[PageName, ...]:
        """Names of the pages that ``tokens``, the next ones, fill."""
        size = self._page_tokens
        first = len(self.tokens) // size
        self.tokens += tokens
        if self._key is None:
            return ()
        keys = []
        for page in range(first, len(self.tokens) // size):
            content = self.tokens[page * size : (page + 1) * size]
            self._key = chain(self._key, content)
            keys.append(PageName(self._key, self._blocks.extend(content)))
        return tuple(keys)
