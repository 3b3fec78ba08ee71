"""Write what a robot needs from one of its bags: a file of topics, a rig file and a parameter file for the node.

    occbev rig my_bag --out vehicle
    occbev rig my_bag --rig calibration.yaml --out vehicle      # a bag without camera_info
    occbev overlay my_bag --topics vehicle/topics.yaml --out overlay
    occbev run params_file:=vehicle/perception.yaml

topics.yaml names every topic: rename cameras, add or drop topics there. bag-check, pairs, prepare, learn, overlay and
the node's parameter `topics` take it. rig.yaml holds lens and pose of every camera: edit it if the bag has a wrong
calibration, and give it with --rig. perception.yaml holds the parameters of the node for the same topics.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.markup import escape
from rich.table import Table

from occbev import graph
from occbev.cli.console import make_console
from occbev.messages.bags import BagReader
from occbev.messages.topics import ODOMETRY, BagTopics, load_topics, topics_record
from occbev.rig import CameraRig, viewing_direction
from occbev.streams.parameters import parameters_from_record, read_parameters

if TYPE_CHECKING:
    from occbev_training.sources.bags import BagRecording

TOPICS_HEADER = """\
# All topics of this vehicle: for the option --topics of the commands and the parameter `topics` of the node.
#   cameras     NAME: {image, info, frame}. Leave out info if a rig file has the calibration. frame is the optical frame,
#               only needed if the messages name another one.
#   lidar       PointCloud2, or a list of several
#   odometry    Odometry, PoseStamped or PoseWithCovarianceStamped (for the last two the node also needs
#               ego_motion.odometry_type). Left out: poses come from tf.
"""

PARAMETERS_HEADER = "# Parameters of the perception node; docs/topics-and-parameters.md lists all.\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("bag", type=Path, help="bag folder, .mcap or .db3 file")
    parser.add_argument("--out", type=Path, required=True, help="folder for topics.yaml, rig.yaml and perception.yaml")
    parser.add_argument("--topics", type=Path, help="YAML file of topics, if they are not found automatically")
    parser.add_argument("--rig", type=Path, help="rig file, in place of the bag's camera_info")
    parser.add_argument("--base-frame", default="base_link", help="frame of the vehicle (default: base_link)")
    parser.add_argument("--model", default="occbev-tiny", help="model package of the node (default: occbev-tiny)")
    parser.add_argument("--force", action="store_true", help="overwrite existing files")


def run(args: argparse.Namespace) -> int:
    """Write the three files and print the cameras."""
    topics = None if args.topics is None else load_topics(args.topics)
    recording = read_recording(
        args.bag, topics, args.base_frame, None if args.rig is None else CameraRig.load(args.rig)
    )
    found, rig = recording.topics, recording.rig
    rig_file = None if args.rig is None else args.out / "rig.yaml"
    texts = {
        "topics.yaml": TOPICS_HEADER + _dump(topics_record(found)),
        "rig.yaml": rig.as_text(),
        "perception.yaml": parameter_text(recording, args.base_frame, args.model, rig_file),
    }
    _write(args.out, texts, args.force)
    notes = [*recording.notes, *([_STANDING.format(recording.without_poses)] if recording.without_poses else [])]
    _print(rig, found, recording.left_out, notes, args.out)
    print_next(args.bag, args.out, rig_file)
    return 0


def read_recording(bag: Path, topics: BagTopics | None, base_frame: str, rig: CameraRig | None = None) -> BagRecording:
    """Read what a bag has of cameras, calibration and poses; topics that are None are found by name and type.

    A bag without poses will do: so does a node. rig: calibration in place of the bag's own.

    Raises:
        RecordingError: naming the topic, frame or count that is wrong or ambiguous.
        LookupError: the offline package is not installed.
    """
    try:
        from occbev_training.sources.bag_index import BagOptions
        from occbev_training.sources.bags import BagRecording
    except ImportError as error:
        raise LookupError(
            f"reading recordings needs the offline package ({error}): pip install --no-deps ./training"
        ) from error
    recording = BagRecording(bag, BagOptions(topics, base_frame=base_frame, rig=rig), needs_poses=False)
    recording.close()
    return recording


def parameter_text(recording: BagRecording, base_frame: str, model: str, rig_file: Path | None = None) -> str:
    """Return the parameter file of a node that reads the topics of a recording.

    rig_file: where the node finds its calibration; None for camera_info and transforms.
    """
    parameters = node_parameters(recording.topics, recording.rig, base_frame, model, recording.pose_type)
    if recording.without_poses:
        parameters["ego_motion"] = {"source": "none"}
    if rig_file is not None:
        parameters["rig"] = str(rig_file.absolute())
    parameters_from_record(parameters)  # so that nothing is written that the node refuses
    return PARAMETERS_HEADER + _dump({"/**": {"ros__parameters": parameters}})


def find_parameter_file(bag: Path, changes: Mapping[str, str], folder: Path) -> Path:
    """Return the parameter file of a node that reads a bag: the shipped one, or one in `folder` for the topics found.

    Topics are looked for where `changes` names none and the bag has no image topic of the shipped file, or `changes`
    names a rig of other cameras. What was found is printed, or why nothing was: then the shipped file is returned, and
    whoever opens the bag with it refuses it with both lists of topics.
    changes: dotted parameter -> value as text, laid over the file later.
    """
    shipped = Path(graph.params_file({}))
    if any(name == "topics" or name.startswith("cameras.") for name in changes):
        return shipped
    anchor_aside = {name: value for name, value in changes.items() if name != "anchor"}  # it is a camera of the bag
    parameters = read_parameters(shipped, anchor_aside)
    rig = CameraRig.load(parameters.rig) if parameters.rig else None
    with BagReader(bag) as reader:
        known = any(topic in reader.topics for name in parameters.names for topic in parameters.image_topics(name))
    if known and (rig is None or set(parameters.names) <= set(rig.names)):
        return shipped
    try:
        recording = read_recording(bag, None, parameters.base_frame, rig)
    except (ValueError, LookupError) as error:
        print(f"topics were not found automatically: {error}", file=sys.stderr)
        return shipped
    path = folder / "perception.yaml"
    path.write_text(parameter_text(recording, parameters.base_frame, parameters.model))
    print(_describe_found(bag, recording, parameters.rig), file=sys.stderr)
    return path


def _describe_found(bag: Path, recording: BagRecording, rig: str) -> str:
    """Return in one line what was found in a bag. rig: rig file, "" for none."""
    topics = recording.topics
    cameras = ", ".join(f"{name} ({topics.images[name]})" for name in recording.rig.names)
    left_out = f"; left out, as warned: {', '.join(recording.left_out)}" if recording.left_out else ""
    command = f"occbev {shlex.join(('rig', str(bag), *(('--rig', rig) if rig else ()), '--out', 'vehicle'))}"
    poses = "none, so ego motion is off" if recording.without_poses else topics.odometry or topics.tf
    return (
        f"{bag}: no parameter file names its topics; found in it: cameras {cameras}; "
        f"poses {poses}{left_out}. `{command}` writes them to a file to keep"
    )


def print_next(bag: Path, folder: Path, rig_file: Path | None = None) -> None:
    """Print what to do with the files, as commands. rig_file: calibration of a bag that has none."""
    rig = () if rig_file is None else ("--rig", str(rig_file))
    overlay = ("overlay", str(bag), "--topics", str(folder / "topics.yaml"), *rig, "--out", "overlay")
    replay = ("replay", str(bag), "--params-file", str(folder / "perception.yaml"))
    print(f"Next: occbev {shlex.join(overlay)}    # check the calibration")
    print(f"      occbev {shlex.join(replay)}    # run the node on the bag")


def node_parameters(
    topics: BagTopics, rig: CameraRig, base_frame: str, model: str, pose_type: str = ODOMETRY
) -> dict[str, Any]:
    """Return the parameters of a node that reads the topics of a bag; its calibration comes from them, too.

    pose_type: type of the messages on `topics.odometry`.
    """
    cameras: dict[str, Any] = {"names": list(rig.names)}
    for name in rig.names:
        own = {
            "topic": topics.images[name],
            "info_topic": topics.infos.get(name, ""),
            "frame_id": topics.frames.get(name),
        }
        cameras[name] = {key: value for key, value in own.items() if value}
    motion = {"odometry_topic": topics.odometry} if topics.odometry else {"source": "tf"}
    if topics.odometry and pose_type != ODOMETRY:
        motion["odometry_type"] = pose_type
    return {
        "model": model,
        "base_frame": base_frame,
        "tf_topic": topics.tf,
        "tf_static_topic": topics.tf_static,
        "ego_motion": motion,
        "cameras": cameras,
    }


_STANDING = "{}. perception.yaml switches ego motion off, and training needs poses"


def _dump(record: dict[str, Any]) -> str:
    return yaml.safe_dump(record, sort_keys=False, default_flow_style=None, width=110)


def _write(folder: Path, texts: dict[str, str], force: bool) -> None:
    there = [name for name in texts if (folder / name).exists()]
    if there and not force:
        raise FileExistsError(f"{folder / there[0]} exists; choose another folder, or give --force to write over it")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)


def _print(rig: CameraRig, topics: BagTopics, left_out: dict[str, str], notes: list[str], folder: Path) -> None:
    table = Table("camera", "topic", "size", "lens", "looks")
    for column in table.columns:
        column.overflow = "fold"
    for camera in rig.cameras:
        lens = "pinhole" if camera.lens.is_pinhole else camera.distortion_model
        size, topic = f"{camera.width}x{camera.height}", escape(topics.images[camera.name])
        table.add_row(escape(camera.name), topic, size, lens, viewing_direction(camera))
    for name, reason in left_out.items():
        table.add_row(escape(name), escape(topics.images[name]), "-", "-", f"[yellow]left out: {escape(reason)}")
    console = make_console()
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)
    console.print(f"topics.yaml, rig.yaml and perception.yaml are in {folder}", markup=False, highlight=False)
