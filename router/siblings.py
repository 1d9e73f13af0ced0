"""What all routers of the application count and time, from whichever of them is asked (ADR 17).

The ingress sends each scrape to the router it likes, so that one router's own numbers would jump from scrape to scrape.
The one that is asked therefore asks the others, past the ingress, with the headers that the scrape came with: each
checks the key itself. Every series says in the label ``router`` whose it is.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterable, Mapping

import aiohttp

log = logging.getLogger(__name__)

OWN_PATH = "/metrics/router"  # of one router, by its own port
ASK_S = 2.0  # for one sibling's whole answer; Prometheus waits 10 s by default
MOST_BYTES = 16 << 20
PASSED_ON = ("authorization", "x-baton-front")  # the operator's key, and the proof of the ingress (``router.gate``)
FAMILY = re.compile(rb"^(?=# HELP )", re.MULTILINE)
LABELLED = re.compile(rb'(?:^|,)router="')  # not in a value: there quotes are escaped
UP = b"# HELP baton_router_up 1 where the router told its metrics.\n# TYPE baton_router_up gauge\n"


class Siblings:
    """The other routers, as Serve lists them."""

    def __init__(self, own: str) -> None:
        self._own = own
        self._addresses: dict[str, str] = {}

    def update(self, addresses: Mapping[str, str]) -> None:
        """``host:port`` of every router's HTTP server, by its id; the own one may be among them."""
        self._addresses = {router: address for router, address in addresses.items() if router != self._own}

    async def metrics(self, own: bytes, headers: Mapping[str, str]) -> bytes:
        """``own`` with what the siblings tell now. One that does not answer is named, and its series are missing."""
        passed = {name: headers[name] for name in PASSED_ON if name in headers}
        routers = list(self._addresses.items())
        async with aiohttp.ClientSession(headers=passed, timeout=aiohttp.ClientTimeout(total=ASK_S)) as session:
            answers = await asyncio.gather(*(_ask(session, router, address) for router, address in routers))
        told = {self._own: own} | {router: answer for (router, _), answer in zip(routers, answers, strict=True)}
        return merged(told)


async def _ask(session: aiohttp.ClientSession, router: str, address: str) -> bytes:
    """The router's own exposition; empty when there is none to be had."""
    text = bytearray()
    try:
        async with session.get(f"http://{address}{OWN_PATH}", allow_redirects=False) as response:
            response.raise_for_status()
            async for part in response.content.iter_chunked(64 << 10):
                text += part
                if len(text) > MOST_BYTES:
                    log.warning("router %s at %s tells more than %d bytes of metrics", router, address, MOST_BYTES)
                    return b""
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        log.warning("router %s at %s tells no metrics: %s", router, address, error or type(error).__name__)
        return b""
    return bytes(text)


def merged(told: Mapping[str, bytes]) -> bytes:
    """Expositions of routers, by id, as one: each family once, every series with its router; empty is down. Pure."""
    families: dict[bytes, tuple[bytes, list[bytes]]] = {}
    for router, text in told.items():
        for family in FAMILY.split(text)[1:]:
            lines = family.splitlines(keepends=True)
            head = b"".join(line for line in lines if line.startswith(b"#"))
            _, samples = families.setdefault(head.split(b" ", 3)[2], (head, []))
            samples += _labelled(router, (line for line in lines if not line.startswith(b"#")))
    up = [b'baton_router_up{router="%s"} %d\n' % (router.encode(), bool(text)) for router, text in told.items()]
    parts = [(UP, up), *families.values()]
    return b"".join(head + b"".join(samples) for head, samples in parts)


def _labelled(router: str, lines: Iterable[bytes]) -> Iterable[bytes]:
    """``name{a="b"} 1`` and ``name 1`` with the router as first label, unless they have it."""
    label = b'router="%s"' % router.encode()
    for line in lines:
        name, brace, rest = line.partition(b"{")
        if not brace:
            name, _, value = line.partition(b" ")
            yield b"%s{%s} %s" % (name, label, value)
        elif LABELLED.search(rest):
            yield line
        else:
            yield b"%s{%s,%s" % (name, label, rest)
