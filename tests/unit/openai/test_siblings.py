"""Several routers: whichever is asked tells the sums of all of them, and names one that does not answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from router.siblings import OWN_PATH, merged

if TYPE_CHECKING:
    from tests.unit.openai.conftest import ServerFactory


def summed(text: str) -> dict[str, float]:
    """Every series by its name and labels but ``router``, summed over the routers."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["router"]
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()) if key != "router")
            found[f"{sample.name}{{{labels}}}"] = found.get(f"{sample.name}{{{labels}}}", 0.0) + sample.value
    return found


@pytest.fixture(scope="module")
def routers(start_server: ServerFactory, model_folder: object) -> Iterator[tuple[httpx2.Client, httpx2.Client]]:
    """Two of them, each with its workers, which know each other as Serve would tell them."""
    with (
        start_server(model_folder, max_context=64, router_id="one") as one,
        start_server(model_folder, max_context=64, router_id="two") as two,
    ):
        addresses = {"one": f"127.0.0.1:{one.port}", "two": f"127.0.0.1:{two.port}"}
        for server in (one, two):
            server.service.siblings.update(addresses)
        yield one.http, two.http


def test_each_router_tells_the_sums_of_all(routers: tuple[httpx2.Client, httpx2.Client]) -> None:
    for http, count in zip(routers, (2, 1), strict=True):
        for _ in range(count):
            body = {"prompt": "Once upon a time", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
            assert http.post("/v1/completions", json=body).status_code == 200
    for http in routers:
        found = summed(http.get("/metrics").text)
        assert found["baton_router_requests_total{outcome=completed}"] == 3
        assert found["baton_router_tokens_total{}"] == 9
        assert found["gen_ai_server_request_duration_seconds_count{gen_ai_operation_name=text_completion,"
                     f"gen_ai_provider_name=baton,gen_ai_request_model={model_of(http)}}}"] == 3  # fmt: skip
        assert found["baton_router_up{}"] == 2
    own = routers[1].get(OWN_PATH).text
    assert 'baton_router_requests_total{outcome="completed",router="two"} 1.0' in own
    assert 'router="one"' not in own


def model_of(http: httpx2.Client) -> str:
    return str(http.get("/v1/models").json()["data"][0]["id"])


def test_a_router_that_does_not_answer_is_named(start_server: ServerFactory, model_folder: object) -> None:
    with start_server(model_folder, max_context=64, router_id="one") as one:
        one.service.siblings.update({"one": f"127.0.0.1:{one.port}", "gone": "127.0.0.1:1"})
        text = one.http.get("/metrics").text
    assert 'baton_router_up{router="one"} 1' in text
    assert 'baton_router_up{router="gone"} 0' in text


def test_expositions_are_merged_family_by_family() -> None:
    one = b'# HELP a A.\n# TYPE a counter\na_total{x="y} z"} 1\n# HELP b B.\n# TYPE b gauge\nb 2\n'
    two = b'# HELP b B, of another version.\n# TYPE b gauge\nb{o="1",router="q"} 3\n'
    assert merged({"p": one, "q": two, "r": b""}).decode() == (
        '# HELP baton_router_up 1 where the router told its metrics.\n# TYPE baton_router_up gauge\n'
        'baton_router_up{router="p"} 1\nbaton_router_up{router="q"} 1\nbaton_router_up{router="r"} 0\n'
        '# HELP a A.\n# TYPE a counter\na_total{router="p",x="y} z"} 1\n'
        '# HELP b B.\n# TYPE b gauge\nb{router="p"} 2\nb{o="1",router="q"} 3\n'
    )  # fmt: skip
