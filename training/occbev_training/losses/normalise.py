"""The count that a loss is divided by, averaged over the processes of a training run."""

from __future__ import annotations

from torch import Tensor, distributed


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of a detached tensor over all processes.

    Gradients are averaged over processes: a sum divided by the *mean* of what it is counted by gives what
    one process would get from the joined batch.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    total = value.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
