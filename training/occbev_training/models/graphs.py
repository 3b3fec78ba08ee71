"""Networks as graphs: images, validity, geometry tables and state in, named outputs out, one frame at a time.

Exported graphs are these modules written down, and the torch runtime runs them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from occbev.inference.backend import FACTORS, LOGITS
from occbev.inference.tables import GATHER_STAGES
from occbev_training.models.heads.record import heads_of, take_last_layers
from occbev_training.models.lift_splat.bevdet import BevDetNetwork
from occbev_training.models.lift_splat.lift_splat import BatchedPoints
from occbev_training.models.lift_splat.temporal import warp_bev
from occbev_training.models.network import NetworkOutput, OccBevNetwork
from occbev_training.models.queries.bevformer import BevFormerViews, CameraSlots, Motion
from occbev_training.models.queries.detr3d import CameraViews
from occbev_training.models.queries.query_networks import BevFormerNetwork, Detr3dNetwork

SOURCES = ("images", "camera_valid")
BAG_TABLES = ("table_pixel", "table_depth", "table_weight", "table_offset", "table_ray")
GATHER_TABLES = (
    "table_pixel",
    "table_depth",
    "table_weight",
    *(f"table_stage{stage}" for stage in range(2, GATHER_STAGES + 1)),
    "table_cell",
    "table_ray",
)
LIFT_STATE = ("state_in_bev", "state_known", "table_warp")
STEREO_STATE = ("state_in_match", "table_matching")
BEVFORMER_STATE = ("can_bus", "state_in_bev", "state_known", "table_align", "table_shift")


class GraphError(ValueError):
    """A network that cannot be run as a graph, saying which part of it is in the way."""


class Graph(nn.Module):
    """A network in evaluation mode with every input and output named.

    form: the kind of geometry tables it takes, see `occbev.inference.tables.FORMS`.
    inputs, outputs: names, in order.
    """

    form: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval()


class LiftGraph(Graph):
    """What both forms of a Lift-Splat graph share: images, state and heads."""

    network: OccBevNetwork
    tables: tuple[str, ...]

    def __init__(self, network: OccBevNetwork) -> None:
        super().__init__(network)
        self.temporal = network.temporal is not None
        self.stereo = isinstance(network, BevDetNetwork) and network.matching_grid is not None
        self.inputs = (*SOURCES, *self.tables, *LIFT_STATE * self.temporal, *STEREO_STATE * self.stereo)
        self.outputs = _name_outputs(network)
        self.outputs += ("state_out_bev",) * self.temporal + ("state_out_match",) * self.stereo

    def predict_depth(
        self,
        images: Tensor,
        camera_valid: Tensor,
        table_ray: Tensor,
        state_known: Tensor | None,
        state_in_match: Tensor | None,
        table_matching: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return depth logits and context of the images, and what the next frame is matched with.

        state_in_match: (N, F, h / 4, w / 4), of the frame before. table_matching: (N, 3, 4) of `image_to_past`.
        """
        network, ray = self.network, table_ray.flatten(0, 1)
        if not self.stereo:
            return (*network.view_transform.predict_depth(network.image_encoder(images.flatten(0, 1)), ray), None)
        assert isinstance(network, BevDetNetwork)
        assert state_known is not None
        assert state_in_match is not None
        assert table_matching is not None
        features, match = network.image_encoder.with_matching(images.flatten(0, 1))
        assert match is not None
        cost = network.matching_cost(match, state_in_match, table_matching, state_known)
        logits, context = network.view_transform.predict_depth(features, ray, cost)
        return logits, context, match * camera_valid.view(-1, 1, 1, 1)

    def answer(
        self,
        bev: Tensor,
        match: Tensor | None,
        state_in_bev: Tensor | None,
        state_known: Tensor | None,
        table_warp: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Return `outputs` of a splatted BEV.

        state_in_bev: (1, past frames * C, Y, X), or (.., Z, Y, X), newest first, in the frame of the BEV before.
        state_known: (1,), 0 where there was none. table_warp: (1, Y, X, 2) of `warp_table`.
        """
        network = self.network
        if network.temporal is None:
            return self._select(self._heads(bev))
        assert state_in_bev is not None
        assert state_known is not None
        assert table_warp is not None
        bev = network.temporal.refine(bev)
        fallback = torch.cat([bev] * (network.temporal.frames - 1), 1)
        past = fallback + state_known * (warp_bev(state_in_bev, table_warp) - fallback)
        history = past.split(bev.shape[1], 1)
        state = torch.cat([bev, *history[:-1]], 1)
        heads = self._heads(network.temporal(bev, history))
        return self._select({**heads, "state_out_bev": state, "state_out_match": match})

    def _heads(self, bev: Tensor) -> dict[str, Tensor]:
        return self.network.run_heads(bev)

    def _select(self, results: Mapping[str, Tensor | None]) -> tuple[Tensor, ...]:
        chosen = {name: results[name] for name in self.outputs}
        absent = [name for name, value in chosen.items() if value is None]
        if absent:
            raise GraphError(f"the network answers without {absent}")
        return tuple(value for value in chosen.values() if value is not None)


class BagGraph(LiftGraph):
    """A Lift-Splat network that splats by an embedding bag."""

    form, tables = "bag", BAG_TABLES

    def forward(
        self,
        images: Tensor,
        camera_valid: Tensor,
        table_pixel: Tensor,
        table_depth: Tensor,
        table_weight: Tensor,
        table_offset: Tensor,
        table_ray: Tensor,
        state_in_bev: Tensor | None = None,
        state_known: Tensor | None = None,
        table_warp: Tensor | None = None,
        state_in_match: Tensor | None = None,
        table_matching: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return `outputs`."""
        points = BatchedPoints(table_pixel, table_depth, table_weight, table_offset, table_ray)
        stereo = (state_known, state_in_match, table_matching)
        logits, context, match = self.predict_depth(images, camera_valid, table_ray, *stereo)
        bev = self.network.view_transform.pool(logits, context, camera_valid, points)
        return self.answer(bev, match, state_in_bev, state_known, table_warp)


class FactoredGraph(BagGraph):
    """The same, which also gives the probabilities of voxels as factors; for one of our own networks.

    A runtime that decides on voxels needs nothing else of them, and leaves the logits out.
    """

    def __init__(self, network: OccBevNetwork) -> None:
        super().__init__(network)
        if LOGITS in self.outputs:
            self.outputs += FACTORS

    def _heads(self, bev: Tensor) -> dict[str, Tensor]:
        return self.network.run_factored_heads(bev)


class GatherGraph(LiftGraph):
    """A Lift-Splat network that splats by staged gathers, for ONNX."""

    form, tables = "gather", GATHER_TABLES

    def forward(
        self,
        images: Tensor,
        camera_valid: Tensor,
        table_pixel: Tensor,
        table_depth: Tensor,
        table_weight: Tensor,
        table_stage2: Tensor,
        table_stage3: Tensor,
        table_stage4: Tensor,
        table_cell: Tensor,
        table_ray: Tensor,
        state_in_bev: Tensor | None = None,
        state_known: Tensor | None = None,
        table_warp: Tensor | None = None,
        state_in_match: Tensor | None = None,
        table_matching: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return `outputs`."""
        stereo = (state_known, state_in_match, table_matching)
        logits, context, match = self.predict_depth(images, camera_valid, table_ray, *stereo)
        stages = (table_stage2, table_stage3, table_stage4)
        tables = (table_pixel, table_depth, table_weight, *stages, table_cell)
        bev = self.network.view_transform.gather(logits, context, camera_valid, tables)
        return self.answer(bev, match, state_in_bev, state_known, table_warp)


class FactoredGatherGraph(GatherGraph):
    """The same, which also gives the probabilities of voxels as factors; for one of our own networks."""

    def __init__(self, network: OccBevNetwork) -> None:
        super().__init__(network)
        if LOGITS in self.outputs:
            self.outputs += FACTORS

    def _heads(self, bev: Tensor) -> dict[str, Tensor]:
        return self.network.run_factored_heads(bev)


class BevFormerGraph(Graph):
    """A BEVFormer with its tables and the BEV of the frame before."""

    network: BevFormerNetwork
    form = "slots"
    inputs = (*SOURCES, "table_query", "table_points", "table_slot", "table_camera", *BEVFORMER_STATE)

    def __init__(self, network: BevFormerNetwork) -> None:
        super().__init__(network)
        self.outputs = (*_name_outputs(network), "state_out_bev")

    def forward(
        self,
        images: Tensor,
        camera_valid: Tensor,
        table_query: Tensor,
        table_points: Tensor,
        table_slot: Tensor,
        table_camera: Tensor,
        can_bus: Tensor,
        state_in_bev: Tensor,
        state_known: Tensor,
        table_align: Tensor,
        table_shift: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return `outputs`."""
        hits = CameraSlots(table_query, table_points, camera_valid[0], table_slot)
        motion = Motion(state_in_bev, state_known, table_align, table_shift)
        output = self.network(images, camera_valid, BevFormerViews(hits, can_bus, table_camera[None], motion))
        return (*_take_answers(self.network, output), output.bev)


class Detr3dGraph(Graph):
    """A DETR3D with its projection matrices."""

    network: Detr3dNetwork
    form = "projection"
    inputs = (*SOURCES, "table_projection", "table_camera")

    def __init__(self, network: Detr3dNetwork) -> None:
        super().__init__(network)
        self.outputs = _name_outputs(network)

    def forward(
        self, images: Tensor, camera_valid: Tensor, table_projection: Tensor, table_camera: Tensor
    ) -> tuple[Tensor, ...]:
        """Return `outputs`."""
        output = self.network(images, camera_valid, CameraViews(table_projection, table_camera[None]))
        return _take_answers(self.network, output)


def _name_outputs(network: nn.Module) -> tuple[str, ...]:
    return tuple(name for head in heads_of(network) for name in head.outputs)


def _take_answers(network: nn.Module, output: NetworkOutput) -> tuple[Tensor, ...]:
    return tuple(take_last_layers(heads_of(network), output.answers).values())
