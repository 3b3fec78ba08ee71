"""Images between two processes: what arrives and what receiving costs, with the shipped settings and with the defaults.

Sender and receiver are processes of their own, since both the Fast DDS profile and the allocator are settled at start.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np
import rclpy
from rclpy.executors import SingleThreadedExecutor
from sensor_msgs.msg import CompressedImage, Image

from occbev.allocator import keep_large_blocks
from occbev.benchmarks import Options, Report
from occbev.graph import PROFILE_VARIABLES, SENSOR
from occbev.ros.perception_node import qos_profile
from occbev.ros.transport import SETTLE_S, use_large_image_profile

CAMERA_COUNT, WIDTH, HEIGHT = 6, 1600, 900
KINDS: Mapping[str, tuple[Any, float, int]] = {
    "raw": (Image, 6.0, WIDTH * HEIGHT * 3),
    "jpeg": (CompressedImage, 10.0, 218_000),
}
"""Kind -> message class, rate in Hz, bytes."""

DISCOVERY_S, LINGER_S = 20.0, 2.0


def run(options: Options) -> Report:
    """Send both kinds with both settings, `rounds` sets each (20 rounds of raw images last 3.3 s)."""
    found = {
        f"{kind}{'' if tuned else '_default'}": _measure(kind, tuned, options.rounds)
        for tuned in (True, False)
        for kind in KINDS
    }
    values: dict[str, Any] = {}
    for name, result in found.items():
        values[f"{name}_delivered"] = round(result["received"] / max(1, result["sent"]), 4)
        values[f"{name}_cpu_ms_per_image"] = round(result["cpu_ms"] / max(1, result["received"] - 1), 3)
    values["images"] = f"{CAMERA_COUNT} cameras of {WIDTH}x{HEIGHT}: raw at 6 Hz, JPEG of 218 kB at 10 Hz"
    ratios = {}
    for kind in KINDS:
        ours, default = (values[f"{kind}{setting}_cpu_ms_per_image"] for setting in ("", "_default"))
        if ours and default:  # with the defaults too few images may arrive to tell
            ratios[f"{kind}_cpu_vs_default"] = round(default / ours, 2)
    return Report("transport", values, ratios)


def _measure(kind: str, tuned: bool, sets: int) -> dict[str, float]:
    """Run one receiver and one sender; return what they counted."""
    environment = {k: v for k, v in os.environ.items() if k not in PROFILE_VARIABLES}
    command = [sys.executable, "-m", "occbev.ros.bench_transport", kind, str(sets)] + (["--tuned"] if tuned else [])
    receiver = subprocess.Popen([*command, "receive"], env=environment, stdout=subprocess.PIPE, text=True)
    sender = subprocess.Popen([*command, "send"], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        sent, received = (json.loads(p.communicate(timeout=sets + 120)[0]) for p in (sender, receiver))
    finally:
        for process in (sender, receiver):
            process.kill()
    return {"sent": sent["sent"], **received}


def main(arguments: list[str] | None = None) -> int:
    """Be the sender or the receiver; print what was counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=tuple(KINDS))
    parser.add_argument("sets", type=int)
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("role", choices=("send", "receive"))
    args = parser.parse_args(arguments)
    if args.tuned:
        use_large_image_profile()
        keep_large_blocks()
    rclpy.init(args=[])
    try:
        result = (_send if args.role == "send" else _receive)(args.kind, args.sets)
    finally:
        rclpy.try_shutdown()
    print(json.dumps(result))
    return 0


def _send(kind: str, sets: int) -> dict[str, float]:
    message_class, rate, size = KINDS[kind]
    node = rclpy.create_node("bench_sender")
    publishers = [node.create_publisher(message_class, f"/bench/camera_{i}", 10) for i in range(CAMERA_COUNT)]
    message = _message(kind, size)
    deadline = time.monotonic() + DISCOVERY_S
    while any(p.get_subscription_count() == 0 for p in publishers):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no receiver within {DISCOVERY_S:.0f} s")
        time.sleep(0.02)
    time.sleep(SETTLE_S)
    start = time.monotonic()
    for number in range(sets):
        time.sleep(max(0.0, start + number / rate - time.monotonic()))
        for publisher in publishers:
            publisher.publish(message)
    time.sleep(LINGER_S)
    node.destroy_node()
    return {"sent": sets * CAMERA_COUNT}


def _receive(kind: str, sets: int) -> dict[str, float]:
    """Count images; CPU time from the first to the last one, so that starting up is left out."""
    message_class, rate, _ = KINDS[kind]
    node = rclpy.create_node("bench_receiver")
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    marks: list[tuple[float, float]] = []
    pixels = 0

    def take(message: Any) -> None:
        nonlocal pixels
        pixels += len(np.frombuffer(message.data, np.uint8))
        marks.append((time.monotonic(), time.process_time()))

    for i in range(CAMERA_COUNT):
        node.create_subscription(message_class, f"/bench/camera_{i}", take, qos_profile(SENSOR))
    quiet_s = DISCOVERY_S + sets / rate
    last = time.monotonic()
    while len(marks) < sets * CAMERA_COUNT and time.monotonic() - last < (LINGER_S if marks else quiet_s):
        executor.spin_once(timeout_sec=0.1)
        last = marks[-1][0] if marks else last
    executor.shutdown()
    node.destroy_node()
    cpu_s = marks[-1][1] - marks[0][1] if marks else 0.0
    return {"received": len(marks), "cpu_ms": 1e3 * cpu_s}


def _message(kind: str, size: int) -> Any:
    data = array("B")
    data.frombytes(np.random.default_rng(0).integers(0, 256, size, np.uint8).data)
    if kind == "raw":
        return Image(width=WIDTH, height=HEIGHT, step=3 * WIDTH, encoding="rgb8", data=data)
    return CompressedImage(format="jpeg", data=data)


if __name__ == "__main__":
    sys.exit(main())
