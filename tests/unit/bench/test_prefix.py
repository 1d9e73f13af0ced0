"""The prefix cache replays the published traces with the hit rates that are known for them."""

from __future__ import annotations

import pytest

from bench import prefix


@pytest.mark.skipif(not prefix.TRACES.is_dir(), reason=f"no traces in {prefix.TRACES}")
def test_an_unbounded_cache_hits_what_the_mooncake_traces_allow() -> None:
    rates = {name: round(found["hit_rate"], 4) for name, found in prefix.hit_rates().items()}
    assert rates == {"conversation": 0.3664, "synthetic": 0.6396}
