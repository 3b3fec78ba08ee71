"""Metadata of the ROS 2 package `occbev`; also what pip installs."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "src/occbev/__init__.py").read_text())[1]

EXTRAS = {
    "robot": [
        "opencv-python-headless>=4.5.4",  # the first with IMREAD_REDUCED and CPython 3.10 wheels
        "openvino>=2024.4",  # EmbeddingBagOffsets with per-sample weights from ONNX and IR
        "onnxruntime>=1.17",
        "rosbags>=0.11",  # the first that unpacks with the two below
        "lz4>=4",
        "backports.zstd>=1; python_version < '3.14'",  # later ones have compression.zstd
        "rich>=13",
    ],
    # ROS 2 where no distribution is installed: the Kilted wheels (CPython 3.10 to 3.13, x86_64).
    # ros-jazzy-* on PyPI are empty, so these names are the ones to use.
    "ros": ["ros-rclpy>=9.1", "ros-common-interfaces>=5.5", "ros-rmw-fastrtps-cpp>=9.3"],
    # What the simulator needs: `occbev demo` calls it.
    "demo": ["embreex>=4.4", "trimesh>=4", "scipy>=1.8"],
    "view": ["rerun-sdk>=0.41"],  # its interface changes with every version; older ones were not tried
    "test": ["pytest>=6.2", "hypothesis>=6.36"],  # what `colcon test` runs; those of the two LTS before Kilted
    # GPU only: the graphs use no plug-in. 10 is the first with strongly typed networks that hold all our operators;
    # cuda-python 12.8 is the first whose cuda-bindings are split off; its major version must be that of the driver's CUDA.
    "tensorrt": ["tensorrt>=10", "cuda-python>=12.8"],
}


def data_files() -> list[tuple[str, list[str]]]:
    """List launch files, every sub-folder of config, and in lib/occbev what `ros2 run` and launch files start."""
    share = "share/occbev"
    files = [("share/ament_index/resource_index/packages", ["resource/occbev"])]
    files.append((share, ["package.xml"]))
    files.append(("lib/occbev", ["scripts/occbev", "scripts/perception"]))
    for folder in ("launch", "config"):
        inside = [path for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
        parents = sorted({path.parent.relative_to(ROOT) for path in inside})
        for parent in parents:
            names = [str(p.relative_to(ROOT)) for p in inside if p.parent == ROOT / parent]
            files.append((f"{share}/{parent}", names))
    return files


setup(
    name="occbev",
    version=VERSION,
    description="Multi-camera 3D boxes and occupancy voxels for ROS 2, pre-trained on occupancy",
    license="Apache-2.0",
    author="The occbev developers",
    maintainer="The occbev developers",
    maintainer_email="occbev@example.org",
    python_requires=">=3.10",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={
        "occbev": ["py.typed"],
        "occbev.messages": ["interfaces/*/msg/*.msg"],
        "occbev.reports": ["page/*.js"],
    },
    data_files=data_files(),
    install_requires=["numpy>=1.21", "PyYAML>=5.4"],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "occbev = occbev.cli:main",  # in bin, which a sourced workspace has on its path
        ]
    },
    zip_safe=False,
)
