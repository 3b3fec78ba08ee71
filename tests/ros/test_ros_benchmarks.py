"""The benchmarks of the ROS side measure what they say; their times are not asserted."""

from __future__ import annotations

import json

import pytest

from occbev.benchmarks import Options
from occbev.cli import main
from occbev.ros import bench_sync as sync


def test_the_baseline_is_the_classic_matcher() -> None:
    search = sync.ApproximateTime(("a", "b"), slop_s=0.02)
    assert search.push("a", 0, 1) is None
    assert search.push("b", 50_000_000, 1) is None
    assert search.push("a", 55_000_000, 1) == {55_000_000: 1, 50_000_000: 1}


@pytest.mark.parametrize("with_ros_time", [False, True])
def test_the_baseline_loses_and_mixes_what_it_is_known_to(with_ros_time: bool) -> None:
    if with_ros_time:
        pytest.importorskip("rclpy", reason="needs ROS 2")
    stream = sync.arrivals(0, drop=0.05)[:600]
    assert sync._search(stream, 0.1, with_ros_time) > 10
    search = sync.ApproximateTime(sync.CAMERA_NAMES, 0.02, with_ros_time=with_ros_time)
    clean = sync.arrivals(0)[:300]
    assert not any(search.push(i.camera, i.stamp_ns, i.sweep) for i in clean)


def test_the_sync_benchmark_reports_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "SEEDS", 1)
    monkeypatch.setattr(sync, "SWEEPS", 100)
    record = sync.run(Options(rounds=1)).as_record()
    assert (record["values"]["mixed_sets"], record["values"]["non_increasing"]) == (0, 0)
    assert record["values"]["complete_share_jitter40"] >= 0.99
    assert record["values"]["us_per_message"] > 0
    assert "us_vs_approximate_time_on_integers" in record["ratios"]


def test_the_cloud_benchmark_compares_equal_clouds(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rclpy", reason="needs ROS 2")
    from occbev.messages.readers import cloud_from_message
    from occbev.ros.bench_clouds import make_labelled_volume
    from occbev.ros.outputs import CloudWriter, header_at

    assert main(["bench", "clouds", "--rounds", "1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["values"]["voxels"] == 30_000
    assert record["ratios"]["vs_structured_create_cloud"] > 0
    cloud = cloud_from_message(CloudWriter().message(make_labelled_volume(500), header_at(1, "base_link")))
    assert len(cloud) == 500


@pytest.mark.ros
def test_the_transport_benchmark_counts_what_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rclpy", reason="needs ROS 2")
    from occbev.ros import bench_transport

    found = bench_transport._measure("jpeg", tuned=True, sets=4)
    assert found["sent"] == 24
    assert 0 < found["received"] <= 24
    assert found["cpu_ms"] > 0
