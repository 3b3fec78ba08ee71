"""The families of networks that the robot runs. A new one is a file beside this one and a line in `FAMILIES`.

A file holds the configuration class of its family and `FAMILY`, its record: see `occbev.inference.families.record`.
What training adds, networks and graphs, stands in `occbev_training.models.families`.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from occbev.config import ConfigError, ModelConfig, from_record, read_record
from occbev.inference.families import bevdet, bevformer, detr3d, lift_splat
from occbev.inference.families.record import Family

logger = logging.getLogger(__name__)

FAMILIES: Mapping[str, Family[Any]] = {
    "lss": lift_splat.FAMILY,
    "bevdet": bevdet.FAMILY,
    "bevformer": bevformer.FAMILY,
    "detr3d": detr3d.FAMILY,
}
"""Key `family` of a model's configuration -> its record."""


def family_of(model: ModelConfig) -> Family[Any]:
    """Return the record of a model's family."""
    return FAMILIES[model.family]


def load_model(path: Path) -> ModelConfig:
    """Read a model's configuration, see `read_model`; a `base:` key names one file to lay this one over.

    Raises: ConfigError with the file and the dotted path of the key.
    """
    try:
        return read_model(read_record(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_model(record: Mapping[str, Any], where: str = "") -> ModelConfig:
    """Build the configuration of the family that a record names, by default `lss`; null takes a section away.

    where: dotted path that errors begin with.
    Raises: ConfigError for an unknown family, or a section of another family, with what is allowed.
    """
    record, dot = _rename(dict(record)), f"{where}." if where else ""
    name = record.setdefault("family", "lss")
    if not isinstance(name, str) or name not in FAMILIES:
        near = difflib.get_close_matches(str(name), FAMILIES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{dot}family {name!r}: must be one of {sorted(FAMILIES)}{hint}")
    schema = FAMILIES[name].config
    own = {field.name for field in dataclasses.fields(schema)}
    for key in [key for key in record if key not in own]:
        owners = sorted(n for n, f in FAMILIES.items() if key in {field.name for field in dataclasses.fields(f.config)})
        if owners and record[key] is None:
            del record[key]
        elif owners:
            raise ConfigError(
                f"{dot}{key}: a {name!r} network has no such section, only {owners} have; it has {sorted(own)}"
            )
    return from_record(schema, record, where)


def _rename(record: dict[str, Any]) -> dict[str, Any]:
    """Turn the form of earlier versions into today's, with a warning."""
    if record.get("family", "lss") == "lss" and record.get("bevdet") is not None:
        logger.warning("family 'lss' with a section 'bevdet' is now family 'bevdet'; write that")
        record["family"] = "bevdet"
        for key in ("encoder", "memory", "detection"):  # written out with their defaults, and never read
            record.pop(key, None)
    return record
