"""The geometry tables of the rigs seen last, as the graph of a network of any family takes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occbev.config import ModelConfig
from occbev.inference.capacity import Tables
from occbev.inference.families import family_of
from occbev.inference.tables import FORMS
from occbev.rig import CameraRig


class TableCache:
    """The tables of the rigs seen last, keyed by calibration hash."""

    def __init__(self, model: ModelConfig, form: str, size: int = 4) -> None:
        """form: a key of `FORMS`, as the loaded graph wants it."""
        if form not in FORMS:
            raise ValueError(f"table form {form!r}: must be one of {sorted(FORMS)}")
        self._model, self._form, self._size = model, form, size
        self._tables: dict[str, Tables] = {}

    def tables(self, rig: CameraRig, camera_valid: ArrayLike | None = None) -> Tables:
        """Return the tables of a rig whose cameras have the network's input size.

        camera_valid: (N,); tables of the form "slots" leave missing cameras out, which take up room otherwise.

        They are what `Family.tables` says of the model's family.
        """
        alive = np.ones(len(rig), bool)
        if camera_valid is not None and self._form == "slots":
            alive = np.asarray(camera_valid) > 0
        key = rig.hash + alive.tobytes().hex()
        if key not in self._tables:
            while len(self._tables) >= self._size:
                self._tables.pop(next(iter(self._tables)))
            self._tables[key] = self._build(rig, alive)
        return self._tables[key]

    def _build(self, rig: CameraRig, alive: NDArray[np.bool_]) -> Tables:
        size = (self._model.image.width, self._model.image.height)
        for camera in rig.cameras:
            if (camera.width, camera.height) != size:
                raise ValueError(
                    f"camera {camera.name} is {camera.width}x{camera.height}, the network takes {size[0]}x{size[1]}"
                )
        return family_of(self._model).tables(self._model, rig, alive, self._form)
