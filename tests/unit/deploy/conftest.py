"""Ray Serve warns about its own use of pydantic when it is imported, and warnings are errors in tests."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401
