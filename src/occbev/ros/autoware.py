"""Boxes as Autoware's autoware_perception_msgs/DetectedObjects, where that package is installed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from occbev.classes import DETECTION_CLASSES
from occbev.inference.tracking import position_covariance
from occbev.results import Boxes3D
from occbev.ros.compat import require

PACKAGE = "autoware_perception_msgs"

LABELS = {
    "car": "CAR",
    "truck": "TRUCK",
    "construction_vehicle": "TRUCK",
    "bus": "BUS",
    "trailer": "TRAILER",
    "barrier": "UNKNOWN",
    "motorcycle": "MOTORCYCLE",
    "bicycle": "BICYCLE",
    "pedestrian": "PEDESTRIAN",
    "traffic_cone": "UNKNOWN",
}
"""Our class -> constant of ObjectClassification. Autoware plans around what is UNKNOWN."""

HEIGHT_M, YAW_RAD, VELOCITY = 0.3, 0.2, 2.0
"""Assumed standard deviations of a box's z, yaw and velocity (m/s); those of x and y are the tracker's."""

ROW = 6
"""Rows of a covariance: x, y, z, then turns about x, y, z."""


def detected_objects(boxes: Boxes3D, header: Any) -> Any:
    """Make the message, in base_link at the key time.

    existence_probability is the score of the box. The twist is over ground, along the box's own axes, as Autoware has
    it. Covariances are assumptions, not outputs of the network.

    Raises:
        MissingCapability: autoware_perception_msgs is not installed.
    """
    msg = require(f"{PACKAGE}.msg")
    covariances = position_covariance(boxes.box[:, :3].astype(np.float64)).tolist()
    rows = zip(boxes.box.tolist(), boxes.label.tolist(), boxes.score.tolist(), covariances, strict=True)
    return msg.DetectedObjects(header=header, objects=[_object(msg, *row) for row in rows])


def _object(msg: Any, box: list[float], label: int, score: float, covariance: list[list[float]]) -> Any:
    made = msg.DetectedObject(existence_probability=score)
    constant = getattr(msg.ObjectClassification, LABELS[DETECTION_CLASSES[label]])
    made.classification = [msg.ObjectClassification(label=constant, probability=1.0)]
    made.shape.type = msg.Shape.BOUNDING_BOX
    size = made.shape.dimensions
    size.x, size.y, size.z = box[3:6]
    _move(msg, made.kinematics, box, covariance)
    return made


def _move(msg: Any, kinematics: Any, box: list[float], covariance: list[list[float]]) -> None:
    """Fill in where a box is, and where it goes."""
    pose, yaw = kinematics.pose_with_covariance, box[6]
    pose.pose.position.x, pose.pose.position.y, pose.pose.position.z = box[:3]
    pose.pose.orientation.z, pose.pose.orientation.w = math.sin(yaw / 2), math.cos(yaw / 2)
    for row in range(2):
        for column in range(2):
            pose.covariance[ROW * row + column] = covariance[row][column]
    pose.covariance[ROW * 2 + 2], pose.covariance[ROW * 5 + 5] = HEIGHT_M**2, YAW_RAD**2
    kinematics.has_position_covariance = True
    kinematics.orientation_availability = msg.DetectedObjectKinematics.AVAILABLE
    twist, (vx, vy) = kinematics.twist_with_covariance, box[7:9]
    twist.twist.linear.x = math.cos(yaw) * vx + math.sin(yaw) * vy
    twist.twist.linear.y = math.cos(yaw) * vy - math.sin(yaw) * vx
    twist.covariance[0] = twist.covariance[ROW + 1] = VELOCITY**2
    kinematics.has_twist = kinematics.has_twist_covariance = True
