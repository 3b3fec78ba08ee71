"""PyTorch with the training package's own network, for those who have torch on the robot: CUDA if there, else CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from occbev.inference.backend import Arrays, BackendError, RunSettings
from occbev.inference.model_package import ModelPackage
from occbev_training.models.checkpoints import CheckpointError
from occbev_training.models.families import make_graph
from occbev_training.models.graphs import Graph, GraphError
from occbev_training.models.load import load_network


class TorchBackend:
    """The network in eval mode on one device."""

    name, kept_outputs, at_once = "torch", 1, 1

    def __init__(self, graph: Graph, device: torch.device, low_precision: bool) -> None:
        self._graph, self.form = graph.eval().to(device), graph.form
        graph.network.image_encoder.to(memory_format=torch.channels_last)
        self._device, self._low_precision = device, low_precision
        self.device = f"{device}, {'bf16' if low_precision else 'f32'}"

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; the outputs are fresh arrays."""
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(inputs[name])).to(self._device) for name in self._graph.inputs
        }
        low = torch.autocast(self._device.type, torch.bfloat16, enabled=self._low_precision)
        with torch.inference_mode(), low:
            outputs = self._graph(**tensors)
        arrays = (output.float().cpu().numpy() for output in outputs)
        return dict(zip(self._graph.outputs, arrays, strict=True))


def load(package: ModelPackage, cameras: int, settings: RunSettings) -> TorchBackend:
    """Build the network and load its weights; it takes any number of cameras. Threads are set process-wide."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        graph = make_graph(load_network(package), "native")
    except GraphError as error:
        raise BackendError(f"{package.folder}: {error}") from error
    except CheckpointError as error:
        raise BackendError(f"{error}; was it exported by another version of occbev_training?") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return TorchBackend(graph, device, settings.precision == "auto" and device.type == "cuda")
