"""Scores by the official rules: of result files, and of what a package predicted for a nuScenes root.

A result file is scored as the nuScenes server scores it; a folder of voxels as the Occ3D challenge does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from occbev.geometry import invert_transform
from occbev.results import Boxes3D
from occbev_training.evaluation.data import EvaluationDataError, RootFrames, key_pose
from occbev_training.evaluation.scores import FrameResult, Scores, count_occupancy
from occbev_training.metrics.detection import match_near
from occbev_training.metrics.nuscenes_results import (
    Results,
    ResultsError,
    ego_boxes,
    match_results,
    result_boxes,
)
from occbev_training.metrics.occ3d_results import read_occupancy
from occbev_training.sources.nuscenes import NuscenesRoot


def results_of(frames: Sequence[FrameResult], root: RootFrames, indices: Sequence[int]) -> Results:
    """Turn predicted boxes into official result rows: sample token -> boxes in the global frame."""
    results = {}
    for frame, index in zip(frames, indices, strict=True):
        recording, key = root.keys[index]
        assert frame.boxes is not None
        token = root.tokens[index]
        results[token] = result_boxes(token, frame.boxes, key_pose(recording, key))
    return results


def official_scores(scores: Scores, frames: Sequence[FrameResult], root: RootFrames, indices: Sequence[int]) -> Scores:
    """Score the boxes of a nuScenes root by the official filters and attributes, the rest as it is."""
    if scores.boxes is None:
        return scores
    tokens = [root.tokens[index] for index in indices]
    return replace(scores, boxes=match_results(results_of(frames, root, indices), root.root, tokens))


def scenes_of(root: NuscenesRoot, tokens: Iterable[str], where: str) -> list[str]:
    """Return the scenes that samples are of, so that all samples of these can be asked for.

    where: the file or folder of the results, for errors.

    Raises:
        ResultsError: a sample is of another root, or there is none.
    """
    tokens, samples = set(tokens), root.tables["sample"]
    unknown = sorted(tokens - set(samples))
    if unknown or not tokens:
        what = (
            f"{len(unknown)} samples that are not in {root.path}: {unknown[:3]}" if unknown else f"none of {root.path}"
        )
        raise ResultsError(f"{where}: holds {what}; want samples of one root")
    scenes = {samples[token]["scene_token"] for token in tokens}
    return [row["name"] for token, row in root.tables["scene"].items() if token in scenes]


def score_files(
    root: RootFrames, results: Results | None, voxels: Path | None, progress: Callable[[int], None] = lambda done: None
) -> tuple[Scores, list[FrameResult]]:
    """Score a result file, a folder of voxels, or both, over every sample of a root's scenes.

    root: with frames that have no image.
    Raises:
        ResultsError: a sample is missing, or a file is not what it should be.
        EvaluationDataError: voxels are given and a sample has no dense truth below gts/.
    """
    unknown = sorted(set(results or ()) - set(root.tokens))
    if unknown:
        raise ResultsError(
            f"the results hold {len(unknown)} samples that are not in the scenes of {root.root.path}: {unknown[:3]}"
        )
    frames = []
    for index in range(len(root)):
        frames.append(_frame(root, index, results, voxels))
        progress(index + 1)
    scores = Scores.of([replace(frame, boxes=None) for frame in frames])
    if results is None:
        return scores, frames
    near = match_near(
        [f.boxes for f in frames if f.boxes is not None], [f.annotations for f in frames if f.annotations is not None]
    )
    return replace(scores, boxes=match_results(results, root.root, root.tokens), near_boxes=near), frames


def _frame(root: RootFrames, index: int, results: Results | None, voxels: Path | None) -> FrameResult:
    recording, key = root.keys[index]
    token, boxes, counts = root.tokens[index], None, None
    if results is not None:
        boxes = _boxes(results, token, invert_transform(key_pose(recording, key)))
    if voxels is not None:
        truth = root.truth(index)
        if truth is None:
            raise EvaluationDataError(
                f"{root.root.path}: no gts/{recording.name}/{token}/labels.npz to score voxels against"
            )
        counts = count_occupancy(read_occupancy(voxels, token, truth.grid.shape), truth.grid, truth)
    name = f"{recording.name}/{key:04d}"
    return FrameResult(name, recording.name, boxes, recording.annotations(key), counts)


def _boxes(results: Mapping[str, Any], token: str, global2ego: Any) -> Boxes3D:
    if token not in results:
        raise ResultsError(f"the results must hold every sample of the split; missing {token}")
    return ego_boxes(results[token], global2ego)
