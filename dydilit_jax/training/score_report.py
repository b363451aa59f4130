"""What an evaluation says: a JSON file of scores with all that decided them, and lines."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import dydilit_jax
from dydilit_jax.errors import UserError
from dydilit_jax.metrics.features import Extractor
from dydilit_jax.metrics.references import Reference
from dydilit_jax.training.integrity import write_atomically
from dydilit_jax.training.request import differing_names

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy", "pillow")


def environment(mesh: Mesh) -> dict[str, Any]:
    """Devices, processes and software."""
    device = mesh.devices.flat[0]
    return {
        "devices": f"{mesh.size} x {device.device_kind}",
        "platform": device.platform,
        "processes": jax.process_count(),
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "matmul_precision": _matmul_precision(),
        "versions": {
            "python": platform.python_version(),
            "dydilit_jax": dydilit_jax.__version__,
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }


def _matmul_precision() -> str:
    # JAX defines the attribute when it runs.
    return getattr(jax.config, "jax_default_matmul_precision", None) or "default"


def extractor_fields(extractor: Extractor) -> dict[str, Any]:
    """Which features were computed."""
    return {
        "features": extractor.name,
        "features_description": extractor.description,
        "features_checksum": extractor.checksum,
    }


def reference_fields(path: Path, reference: Reference) -> dict[str, Any]:
    """What samples were compared with."""
    return {
        "reference": str(path.resolve()),
        "reference_checksum": reference.checksum,
        "reference_images": reference.count or "not known",
        "reference_image_shape": list(reference.image_shape or ()) or "not known",
    }


def finished(path: Path, settings: Mapping[str, Any]) -> dict[str, float] | None:
    """The scores that a report of these settings already has; None if there is no report.

    Raises:
      UserError: there is a report of other settings, or something else.
    """
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text())
        before, scores = report["settings"], report["scores"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--out={path} exists and is no report of scores: choose another"
        ) from error
    if differing := differing_names(before, json.loads(json.dumps(settings))):
        raise UserError(
            f"--out={path} has the scores of another request, with another "
            f"{', '.join(differing)}: choose another --out"
        )
    return scores


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Writes a report as indented JSON; numbers that are not finite become null."""
    text = json.dumps(_plain(report), indent=2, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def lines_of(scores: Mapping[str, float | None]) -> list[str]:
    """The scores, a line each."""
    width = max(map(len, scores))
    return [
        f"{name:<{width}}  {'not finite' if value is None else f'{value:.6g}'}"
        for name, value in scores.items()
    ]
