"""The examples for Nav2 name what the node publishes: topics, types, frames, quality of service, cell values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from occbev import graph
from occbev.grid import GRIDS
from occbev.results import BLOCKED_CELL, UNKNOWN_CELL
from occbev.streams.parameters import PerceptionParameters

SENSOR_DATA, LATCHED = graph.Quality("best_effort"), graph.Quality("reliable", "transient_local", 1)
"""How Nav2's obstacle layer and its static layer subscribe."""

OUTPUTS = {graph.resolve(topic.name): topic for topic in graph.OUTPUT_TOPICS.values()}
FRAME = PerceptionParameters().base_frame


def costmap(repository: Path, name: str) -> dict[str, Any]:
    record = yaml.safe_load((repository / f"config/nav2/{name}.yaml").read_text())
    values = record["local_costmap"]["local_costmap"]["ros__parameters"]
    assert [layer for layer in values["plugins"] if "plugin" not in values[layer]] == []
    assert values["robot_base_frame"] == FRAME
    return dict(values)


def test_the_ground_grid_is_a_static_layer_in_its_own_frame(repository: Path) -> None:
    values = costmap(repository, "ground_grid")
    layer = values["occbev_grid"]
    topic = OUTPUTS[layer["map_topic"]]
    assert topic.type == "nav_msgs/msg/OccupancyGrid"
    assert layer["plugin"] == "nav2_costmap_2d::StaticLayer"
    assert layer["map_subscribe_transient_local"] is True
    assert topic.quality.reaches(LATCHED)
    assert values["global_frame"] == FRAME, "the grid moves with the vehicle"
    assert values["lethal_cost_threshold"] == BLOCKED_CELL
    assert values["unknown_cost_value"] == UNKNOWN_CELL % 256
    grid = GRIDS["occ3d"]
    assert values["resolution"] == pytest.approx(grid.pitch[0])
    assert values["width"] <= grid.hi[0] - grid.lo[0]


def test_the_obstacle_cloud_is_an_observation_source(repository: Path) -> None:
    values = costmap(repository, "obstacle_cloud")
    layer = values["obstacles"]
    source = layer[layer["observation_sources"]]
    topic = OUTPUTS[source["topic"]]
    assert topic.type.endswith(f"/{source['data_type']}")
    assert topic.quality.reaches(SENSOR_DATA)
    assert source["sensor_frame"] == FRAME
    assert values["global_frame"] == PerceptionParameters().ego_motion.fixed_frame
    grid = GRIDS["occ3d"]
    assert source["obstacle_max_range"] <= grid.hi[0]
    for limits in (source, {"min_obstacle_height": source["min_obstacle_height"], **layer}):
        assert limits["min_obstacle_height"] < grid.lo[2]
        assert limits["max_obstacle_height"] > grid.hi[2]
