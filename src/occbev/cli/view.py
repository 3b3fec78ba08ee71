"""Show a run in Rerun: cameras with boxes and voxels, the scene in 3D, latency and losses as plots.

occbev view                               # live, beside a running node
occbev view out/run                       # what `occbev replay my_bag --record out/run` wrote
occbev view my_bag out/run                # with the LiDAR of the bag that was played
occbev view my_bag out/run --save run.rrd
occbev view out/pairs                     # training pairs
occbev view out/pairs --pair 0 --picture pair.png         # one pair as a picture, with its evidence
occbev view nuscenes-root --scene scene-0061 --model occbev-tiny
occbev view my_bag --serve                # in a browser
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from occbev import graph
from occbev.cli.rig import find_parameter_file
from occbev.grid import VoxelGrid
from occbev.inference.model_package import ModelPackage, find_package
from occbev.messages.bags import BagReader
from occbev.reports.moments import Moment
from occbev.reports.recorded_outputs import OUTPUTS
from occbev.reports.rendering import write_picture
from occbev.reports.rerun_log import MomentLog, import_rerun
from occbev.share import here_or_shipped
from occbev.streams.parameters import PerceptionParameters, read_parameters
from occbev.streams.recorded_moments import recorded_moments

if TYPE_CHECKING:
    from occbev_training.data.shards import PairSample


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "source",
        nargs="*",
        type=Path,
        help="bag with the images, and bag with the results; a folder of pairs; a nuScenes root; none: live",
    )
    parser.add_argument("--save", type=Path, metavar="FILE.rrd", help="write a file, which `rerun FILE.rrd` opens")
    parser.add_argument("--serve", action="store_true", help="show it in a browser instead of the desktop viewer")
    parser.add_argument("--port", type=int, default=9090, help="port of --serve; the next one carries data (9090)")
    parser.add_argument("--frames", type=int, help="largest number of key times to show")
    parser.add_argument(
        "--params-file",
        "--params",
        type=here_or_shipped,
        help="ROS parameter file of the node; without one, a bag's topics are found as by replay",
    )
    parser.add_argument("--model", default="", help="model package of the results; of a nuScenes root: is run on it")
    parser.add_argument("--namespace", default="", help="namespace of a running node")
    parser.add_argument("--pair", metavar="KEY", help="only this pair: DRIVE/STAMP, or its number from 0")
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE.png",
        help="draw one pair instead: images with LiDAR returns, label from above and in slices, visibility, evidence",
    )
    parser.add_argument("--scene", help="only this scene of a nuScenes root")
    parser.add_argument("--version", help="table folder of a nuScenes root, where it has several")


def run(args: argparse.Namespace) -> int:
    """Log every moment of the source; 1 if there was none."""
    if len(args.source) > 2:
        raise ValueError(f"{len(args.source)} sources: want one, or a bag with images and one with results")
    missing = [str(path) for path in args.source if not path.exists()]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)}: no such bag, folder of pairs or nuScenes root")
    if (args.pair or args.picture) and not (args.source and is_pairs(args.source[0])):
        raise ValueError("--pair and --picture need a folder of pairs, as `occbev-train pairs` writes it")
    if args.picture:
        return _draw_pair(args)
    import_rerun()
    title = " + ".join(path.name for path in args.source) or "live"
    return _show(_moments(args), title, args)


def _draw_pair(args: argparse.Namespace) -> int:
    from occbev_training.occupancy.pictures import pair_picture

    sample = next(pair_samples(args.source[0], args.pair or "0"))
    write_picture(str(args.picture), pair_picture(sample))
    Console(stderr=True, highlight=False).print(f"wrote {args.picture}: pair {sample.key}", soft_wrap=True)
    return 0


def _show(moments: Iterator[Moment], title: str, args: argparse.Namespace) -> int:
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
    """Open the source by its kind: live, pairs, nuScenes root or bag."""
    if not args.source:
        return _live(args)
    first = args.source[0]
    if is_pairs(first):
        return pair_moments(first, args.pair)
    if first.is_dir() and (find := _nuscenes_tables()) is not None and find(first):
        return _nuscenes(args)
    parameters = _parameters(args, first)
    outputs = args.source[1] if len(args.source) > 1 else _own_outputs(first)
    return recorded_moments(first, outputs, _as_recorded(first, parameters), _grid(parameters))


def _parameters(args: argparse.Namespace, bag: Path | None = None) -> PerceptionParameters:
    """Read the given parameter file, else the one for the topics of a bag, else the shipped one."""
    changes = {"model": args.model} if args.model else {}
    if args.params_file or bag is None:
        return read_parameters(args.params_file or Path(graph.params_file({})), changes)
    with tempfile.TemporaryDirectory(prefix="occbev_topics_") as folder:
        return read_parameters(find_parameter_file(bag, changes, Path(folder)), changes)


def _grid(parameters: PerceptionParameters) -> VoxelGrid:
    return ModelPackage.load(find_package(parameters.model)).model.grid


def _own_outputs(bag: Path) -> Path | None:
    """Return the bag itself if it also holds results."""
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


def pair_samples(path: Path, key: str | None = None) -> Iterator[PairSample]:
    """Yield the pairs of a folder or of one shard, or the one that `key` names: DRIVE/STAMP, or its number from 0."""
    try:
        from occbev_training.data.shards import ShardReader
    except ImportError as error:
        raise LookupError(f"pairs need the offline package ({error}): pip install ./training") from error
    one_shard = path.suffix == ".tar"
    reader = ShardReader(path.parent if one_shard else path)
    keys = [row["key"] for row in reader.rows if not one_shard or row["shard"] == path.name]
    if key is not None:
        keys = [keys[int(key)] if key.isdigit() and int(key) < len(keys) else key]
    return map(reader.sample, keys)


def pair_moments(path: Path, key: str | None = None) -> Iterator[Moment]:
    """Yield the pairs that `pair_samples` yields, as moments."""
    samples = pair_samples(path, key)
    from occbev_training.occupancy.pictures import pair_moment

    return map(pair_moment, samples)


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
