"""The dashboard shows what a node reports over real DDS."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rich.console import Console

from occbev.cli import main
from occbev.cli.monitor import _check, dashboard
from occbev.graph import DIAGNOSTICS
from occbev.ros import monitor_node
from occbev.ros.monitor_node import Part
from occbev.ros.outputs import diagnostics_message
from occbev.ros.perception_node import qos_profile
from occbev.streams.health import Status

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
    record = json.loads(capsys.readouterr().out)["/perception"]
    assert record["perception"]["values"]["processed"] == "4"
    assert record["CAM_RIGHT"]["level"] == 2
    assert "total.p50_ms" in record["latency"]["values"]

    parts = {name: Part(name, p["level"], p["text"], p["values"], 1e12) for name, p in record.items()}
    text = shown({"/perception": parts})
    assert "CAM_RIGHT" in text
    assert "no image on /perception/input/cam_right/image" in text
    assert "inference" in text


def test_two_nodes_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    context = rclpy.Context()
    rclpy.init(context=context)
    talker = rclpy.create_node("talker", context=context)
    publisher = talker.create_publisher(DiagnosticArray, DIAGNOSTICS.name, qos_profile(DIAGNOSTICS.quality))
    said, ended = {"/red/perception": "6 of 6 cameras are good", "/blue/perception": "2 of 6"}, threading.Event()

    def talk() -> None:
        while not ended.wait(0.1):
            for node, text in said.items():
                publisher.publish(diagnostics_message([Status("occbev: perception", 0, text, {})], 1, node))

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        assert main(["monitor", "--json", "--wait", "20"]) == 0
        reported = capsys.readouterr().out
        assert main(["monitor", "--check", "--wait", "20"]) == 0
    finally:
        ended.set()
        thread.join()
        talker.destroy_node()
        rclpy.shutdown(context=context)
    checked = capsys.readouterr().out.splitlines()
    assert sorted(checked) == sorted(f"{node}: ok: {state}" for node, state in said.items())
    record = json.loads(reported)
    assert {node: parts["perception"]["text"] for node, parts in record.items()} == said
    text = shown({n: {"perception": Part("perception", 0, t, {}, 1e12)} for n, t in said.items()})
    assert all(f"{node}: {state}" in text for node, state in said.items())


def test_a_check_fails_where_a_node_has_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    states = {0: "6 of 6 cameras are good", 2: "0 of 6 cameras are good"}
    nodes = {f"/{level}": {"perception": Part("perception", level, text, {}, 1e12)} for level, text in states.items()}
    assert _check({"/0": nodes["/0"]}) == 0
    assert _check(nodes) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "/2: error: 0 of 6 cameras are good"


def test_a_node_that_is_gone_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    with monitor_node.Listener() as listener:
        for node in ("/red/perception", "/blue/perception"):
            listener._node._take(diagnostics_message([Status("occbev: perception", 0, "good", {})], 1, node))
        assert set(listener.listen(0.0)) == {"/red/perception", "/blue/perception"}
        monkeypatch.setattr(monitor_node, "GONE_S", -1.0)
        assert listener.listen(0.0) == {}


def test_without_a_node_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", "97")
    assert main(["monitor", "--json", "--wait", "0.3"]) == 1
    assert json.loads(capsys.readouterr().out) == {}
    assert main(["monitor", "--check", "--wait", "0.3"]) == 1
    assert "no perception node" in capsys.readouterr().out
    assert main(["monitor", "--check", "--json"]) == 2
    assert "waiting for a perception node" in shown({})
