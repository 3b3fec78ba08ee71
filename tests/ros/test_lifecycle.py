"""Transitions that fail say why, and parameters come and go: dumped, changed while unconfigured, overridden."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("rclpy", reason="needs ROS 2")

from occbev.config import ConfigError
from occbev.streams.parameters import nest_names

pytestmark = pytest.mark.ros


def refuse(*_: Any) -> Any:
    raise AttributeError("nobody expects this")


def test_whatever_a_transition_raises_is_logged_and_fails_it(
    make_bench: Callable[..., Any], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(active=False, frame_log_path="/proc/nowhere/log.jsonl")
    assert bench.transition("configure") == "FAILURE"
    assert "cannot configure: [Errno 2]" in capfd.readouterr().err
    make = bench.node._make_pipeline
    bench.node._make_pipeline = refuse
    assert bench.transition("configure") == "FAILURE"
    assert "cannot configure: AttributeError: nobody expects this" in capfd.readouterr().err
    bench.node._make_pipeline = make
    monkeypatch.setattr(bench.node.frame_log, "open", lambda path: None)
    assert bench.transition("configure") == "SUCCESS"
    subscribe = bench.node._subscribe
    bench.node._subscribe = refuse
    assert bench.transition("activate") == "FAILURE"
    assert "cannot activate: AttributeError" in capfd.readouterr().err
    bench.node._subscribe = subscribe
    assert bench.transition("activate") == "SUCCESS"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"cameras__names": "CAM"}, "cameras.names is 'CAM': want a list of texts"),
        ({"cameras__names": [1, 2]}, r"cameras.names is \[1, 2\]: want a list of texts"),
    ],
)
def test_lists_of_a_wrong_type_are_named(make_bench: Callable[..., Any], values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make_bench(active=False, **values)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"cameras.CAM_LEFT.topic": "/a//b"},
            "cameras.CAM_LEFT.topic '/a//b': topic name must not contain repeated '/'",
        ),
        ({"cameras.CAM_LEFT.info_topic": "left info"}, "cameras.CAM_LEFT.info_topic 'left info': topic name must not"),
        ({"ego_motion.odometry_topic": "/odom/"}, "ego_motion.odometry_topic '/odom/': topic name must not end with"),
    ],
)
def test_what_is_no_topic_is_named_before_the_model_is_loaded(
    make_bench: Callable[..., Any], values: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        make_bench(active=False, **values)


@pytest.mark.parametrize(
    ("sections", "name", "serves"),
    [
        ("/**: {}", "/perception", True),
        ("perception: {}", "/perception", True),
        ("/perception: {}", "/robot/perception", False),
        ("/*/perception: {}", "/robot/perception", True),
        ("/robot: {perception: {}}", "/robot/perception", True),
        ("/**/perception: {}", "/robot/perception", True),
        ("other: {}", "/perception", False),
        ("", "/perception", False),
    ],
)
def test_a_parameter_file_without_a_section_for_the_node_is_named(
    tmp_path: Path, sections: str, name: str, serves: bool
) -> None:
    from occbev.ros.parameters import describe_unused_files

    (tmp_path / "a.yaml").write_text(sections.replace("{}", "{ros__parameters: {model: occbev-tiny}}"))
    text = describe_unused_files([str(tmp_path / "a.yaml")], name)
    assert (text == "") == serves
    assert serves or f"a.yaml: no section for {name}, so defaults hold" in text


def test_model_and_rig_may_change_while_unconfigured(make_bench: Callable[..., Any]) -> None:
    from rclpy.parameter import Parameter

    bench = make_bench(active=False)
    for name in ("model", "backend", "rig"):
        (changed,) = bench.node.set_parameters([Parameter(name, value="auto" if name == "backend" else "")])
        assert changed.successful, changed.reason
    assert bench.transition("configure") == "SUCCESS"
    (refused,) = bench.node.set_parameters([Parameter("model", value="other")])
    assert "model may change only while the node is unconfigured" in refused.reason


def test_durability_of_an_output_can_be_overridden_and_the_grid_is_latched(make_bench: Callable[..., Any]) -> None:
    from rclpy.qos import DurabilityPolicy

    name = "qos_overrides./perception/output/objects.publisher.durability"
    bench = make_bench(**{name: "transient_local"}, wait=False)
    durability = {
        key: bench.node.get_publishers_info_by_topic(publisher.topic_name)[0].qos_profile.durability
        for key, publisher in bench.node._out.items()
    }
    assert durability["objects"] == durability["grid"] == DurabilityPolicy.TRANSIENT_LOCAL
    assert durability["points"] == DurabilityPolicy.VOLATILE


def test_reliability_of_every_output_can_be_overridden(make_bench: Callable[..., Any]) -> None:
    from rclpy.qos import ReliabilityPolicy

    outputs = ("objects", "occupancy/points", "occupancy/obstacles", "occupancy/grid", "markers")
    names = [f"qos_overrides./perception/output/{output}.publisher.reliability" for output in outputs]
    bench = make_bench(**dict.fromkeys(names, "best_effort"), wait=False)
    reliability = {
        key: bench.node.get_publishers_info_by_topic(publisher.topic_name)[0].qos_profile.reliability
        for key, publisher in bench.node._out.items()
        if publisher.topic_name != "/diagnostics"
    }
    assert len(reliability) == len(outputs)
    assert set(reliability.values()) == {ReliabilityPolicy.BEST_EFFORT}


def test_dumped_parameters_load_again(make_bench: Callable[..., Any], tmp_path: Path) -> None:
    import rclpy

    bench = make_bench(sync__timeout_s=1.5)
    values = {name: p.value for name, p in bench.node.get_parameters_by_prefix("").items()}
    plain = {n: list(v) if hasattr(v, "tolist") else v for n, v in values.items()}
    path = tmp_path / "dump.yaml"
    path.write_text(yaml.safe_dump({"/perception": {"ros__parameters": nest_names(plain)}}))
    context = rclpy.Context()
    rclpy.init(args=["--ros-args", "--params-file", str(path)], context=context)
    try:
        from occbev.ros.perception_node import PerceptionNode

        again = PerceptionNode(bench.node._make_pipeline, context=context)
        assert again.parameters == bench.node.parameters
        again.destroy_node()
    finally:
        context.shutdown()


def test_lifecycle_cycles_hold_no_memory(stub_pipeline: Any, assert_nothing_runs: Callable[[], None]) -> None:
    """40 cycles after the first ten; 200 in a process of their own grew by 3.5 MB, of which 5 are allowed."""
    import rclpy
    from rclpy.lifecycle import TransitionCallbackReturn

    from occbev.ros.perception_node import PerceptionNode

    def resident_mb() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    context = rclpy.Context()
    rclpy.init(context=context)
    node = PerceptionNode(stub_pipeline, context=context)
    for cycle in range(50):
        if cycle == 10:
            before_mb = resident_mb()
        for step in ("configure", "activate", "deactivate", "cleanup"):
            assert getattr(node, f"trigger_{step}")() == TransitionCallbackReturn.SUCCESS
    assert resident_mb() - before_mb < 5
    node.close()
    node.destroy_node()
    rclpy.shutdown(context=context)
    assert_nothing_runs()
