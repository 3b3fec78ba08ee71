"""Show a run in Rerun: cameras with boxes and voxels, the scene in 3D, latency and losses as plots.

occbev view                               # live, beside a running node
occbev view out/run                       # what `occbev replay my_bag --record out/run` wrote
occbev view my_bag out/run                # with the LiDAR of the bag that was played
occbev view my_bag out/run --save run.rrd
occbev view out/pairs                     # training pairs
occbev view nuscenes-root --scene scene-0061 --model occbev-tiny
occbev view my_bag --serve                # in a browser
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from occbev import graph
from occbev.cli.viewer_arguments import add_viewer_arguments
from occbev.grid import VoxelGrid
from occbev.inference.model_package import ModelPackage, find_package
from occbev.messages.bags import BagReader
from occbev.reports.moments import Moment
from occbev.reports.recorded_outputs import OUTPUTS
from occbev.reports.rerun_log import MomentLog, import_rerun
from occbev.share import here_or_shipped
from occbev.streams.parameters import PerceptionParameters, read_parameters
from occbev.streams.recorded_moments import recorded_moments

if TYPE_CHECKING:
    from occbev_training.data.shards import ShardReader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "source",
        nargs="*",
        type=Path,
        help="bag with the images, and bag with the results; a folder of pairs; a nuScenes root; none: live",
    )
    add_viewer_arguments(parser)
    parser.add_argument(
        "--params-file", "--params", type=here_or_shipped, help="ROS parameter file of the node: names the topics"
    )
    parser.add_argument("--model", default="", help="model package of the results; of a nuScenes root: is run on it")
    parser.add_argument("--namespace", default="", help="namespace of a running node")
    parser.add_argument("--scene", help="only this scene of a nuScenes root")
    parser.add_argument("--version", help="table folder of a nuScenes root, where it has several")


def run(args: argparse.Namespace) -> int:
    """Log every moment of the source; 1 if there was none."""
    import_rerun()
    if len(args.source) > 2:
        raise ValueError(f"{len(args.source)} sources: want one, or a bag with images and one with results")
    missing = [str(path) for path in args.source if not path.exists()]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)}: no such bag, folder of pairs or nuScenes root")
    moments = _moments(args)
    title = " + ".join(path.name for path in args.source) or "live"
    return show(moments, title, args)


def show(moments: Iterator[Moment], title: str, args: argparse.Namespace) -> int:
    """Log moments to where `args` says and wait where a viewer is served; 1 if there was none."""
    console = Console(stderr=True, highlight=False)
    first = next(moments, None)
    if first is None:
        console.print(f"{title}: no key time to show")
        return 1
    cameras = list(first.images) or (list(first.rig.names) if first.rig is not None else [])
    has_truth = first.true_occupancy is not None or first.true_boxes is not None
    log = MomentLog(title, [*cameras, *first.missing], has_truth)
    _open(log, args, console)
    shown = 0
    try:
        for moment in itertools.islice(itertools.chain([first], moments), args.frames):
            log.log(moment)
            shown += 1
        console.print(f"{shown} key times; open with: rerun {args.save}" if args.save else f"{shown} key times")
        if args.serve and not args.save:
            _wait()
    except KeyboardInterrupt:
        console.print(f"{shown} key times were shown")
    finally:
        log.close()
    return 0


def _open(log: MomentLog, args: argparse.Namespace, console: Console) -> None:
    if args.save:
        log.save(args.save)
    elif args.serve:
        console.print(f"open {log.serve(args.port)} in a browser; Ctrl-C ends", soft_wrap=True)
    else:
        log.show()


def _wait() -> None:
    while True:
        time.sleep(1.0)


def _moments(args: argparse.Namespace) -> Iterator[Moment]:
    """Open the source as what it is."""
    if not args.source:
        return _live(args)
    first = args.source[0]
    if is_pairs(first):
        return pair_moments(first)
    if first.is_dir() and (find := _nuscenes_tables()) is not None and find(first):
        return _nuscenes(args)
    parameters = _parameters(args)
    outputs = args.source[1] if len(args.source) > 1 else _own_outputs(first)
    return recorded_moments(first, outputs, _as_recorded(first, parameters), _grid(parameters))


def _parameters(args: argparse.Namespace) -> PerceptionParameters:
    changes = {"model": args.model} if args.model else {}
    return read_parameters(args.params_file or Path(graph.params_file({})), changes)


def _grid(parameters: PerceptionParameters) -> VoxelGrid:
    return ModelPackage.load(find_package(parameters.model)).model.grid


def _own_outputs(bag: Path) -> Path | None:
    """Return the bag itself where it holds results, too."""
    with BagReader(bag) as reader:
        return bag if any(OUTPUTS in topic for topic in reader.topics) else None


def _as_recorded(bag: Path, parameters: PerceptionParameters) -> PerceptionParameters:
    """Return parameters whose image topics are those of a bag where `replay --record` has compressed them."""
    with BagReader(bag) as reader:
        topics = set(reader.topics)
    cameras = {
        name: replace(camera, topic=f"{camera.topic}/compressed")
        if camera.topic not in topics and f"{camera.topic}/compressed" in topics
        else camera
        for name, camera in parameters.cameras.items()
    }
    return replace(parameters, cameras=cameras)


def _live(args: argparse.Namespace) -> Iterator[Moment]:
    from occbev.ros.view_node import watch

    parameters = _parameters(args)
    return watch(parameters, _grid(parameters), args.namespace)


def is_pairs(path: Path) -> bool:
    """Whether a path is a folder of training pairs or one of its shards."""
    return path.suffix == ".tar" or (path / "index.parquet").is_file()


def pair_moments(path: Path, key: str | None = None) -> Iterator[Moment]:
    """Yield the pairs of a folder or of one shard, or the one pair of a key."""
    try:
        from occbev_training.data.shards import ShardReader
        from occbev_training.occupancy.pictures import pair_moment
    except ImportError as error:
        raise _needs_training(error) from error
    reader: ShardReader = ShardReader(path.parent if path.suffix == ".tar" else path)
    for row in reader.rows:
        chosen = path.suffix != ".tar" or row["shard"] == path.name
        if chosen and key in (None, row["key"]):
            yield pair_moment(reader.sample(row["key"]))


def _nuscenes_tables() -> Callable[[Path], object] | None:
    try:
        from occbev_training.sources.nuscenes import find_tables
    except ImportError:
        return None
    return find_tables


def _nuscenes(args: argparse.Namespace) -> Iterator[Moment]:
    from occbev.inference.pipeline import Pipeline
    from occbev_training.sources.moments import recording_moments
    from occbev_training.sources.nuscenes import open_nuscenes

    scenes = [args.scene] if args.scene else None
    for recording in open_nuscenes(args.source[0], args.version).recordings(scenes, available_only=True):
        pipeline = Pipeline(args.model, recording.rig) if args.model else None
        yield from recording_moments(recording, pipeline)


def _needs_training(error: ImportError) -> LookupError:
    return LookupError(f"pairs need the offline package ({error}): pip install ./training")
