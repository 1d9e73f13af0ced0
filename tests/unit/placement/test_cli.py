"""The commands, end to end on small inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from baton import config
from baton.errors import ConfigError
from placement import cli, traces
from placement.synthetic import ObservedLengths, Poisson, draw

app = typer.Typer()
app.add_typer(cli.workload_app, name="workload")
app.command("plan")(cli.plan)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    drawn = draw("drawn", 80, 5.0, Poisson(), ObservedLengths(((700, 30), (150, 60))), seed=4)
    path = tmp_path / "recorded.jsonl"
    path.write_text("".join(traces.record(arrival) + "\n" for arrival in drawn.arrivals))
    return path


def test_describe_prints_rates_lengths_and_burstiness(recorded: Path) -> None:
    result = CliRunner().invoke(app, ["workload", "describe", str(recorded)])
    assert result.exit_code == 0, result.output
    for word in ("80 requests", "CV of gaps", "prompt tokens", "700", "prefix"):
        assert word in result.output


@pytest.mark.slow
def test_plan_writes_a_configuration_and_a_report(recorded: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output, page = tmp_path / "plan.yaml", tmp_path / "plan.html"
    arguments = ["plan", "--workload", str(recorded), "--ttft-s", "0.4", "--tpot-s", "0.03", "--gpus", "2"]
    arguments += ["--requests", "80", "--processes", "1", "-o", str(output), "--report", str(page)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert config.load(output).decode.replicas >= 1
    assert "data:image/png;base64," in page.read_text()
    assert page.with_suffix(".png").stat().st_size > 1000


def test_slos_that_nothing_meets_are_said_to_be(recorded: Path, tmp_path: Path) -> None:
    arguments = ["plan", "--workload", str(recorded), "--ttft-s", "1e-6", "--tpot-s", "1e-6", "--gpus", "1"]
    arguments += ["--requests", "20", "--processes", "1", "-o", str(tmp_path / "plan.yaml")]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert result.exception.field == "slo"
