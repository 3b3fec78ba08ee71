"""The dashboard shows what a node reports over real DDS."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")

from rich.console import Console

from occbev.cli import main
from occbev.cli.monitor import dashboard

pytestmark = pytest.mark.ros


def shown(parts: Any) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(dashboard(parts))
    return str(console.export_text())


def test_the_dashboard_shows_cameras_drops_and_latency(
    make_bench: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bench = make_bench()
    bench.vehicle.calibrate()
    bench.wait(lambda: not bench.node._intake.read_calibration().problems)
    bench.vehicle.drive(4, cameras=("CAM_FRONT", "CAM_LEFT"))
    bench.wait(lambda: sum(bench.node.frame_log.outcomes.values()) >= 4)
    capsys.readouterr()
    assert main(["monitor", "--json", "--wait", "20"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["perception"]["values"]["processed"] == "4"
    assert record["CAM_RIGHT"]["level"] == 2
    assert "total.p50_ms" in record["latency"]["values"]

    from occbev.ros.monitor_node import Part

    text = shown({name: Part(name, p["level"], p["text"], p["values"], 1e12) for name, p in record.items()})
    assert "CAM_RIGHT" in text
    assert "no image on ~/input/cam_right/image" in text
    assert "inference" in text


def test_without_a_node_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", "97")
    assert main(["monitor", "--json", "--wait", "0.3"]) == 1
    assert json.loads(capsys.readouterr().out) == {}
    assert "waiting for a perception node" in shown({})
