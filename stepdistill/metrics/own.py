"""Your own metrics: a class in a Python file that a suite names under ``metrics``, such as ``./my_metric.py``.

class Colours:
    name = "colours"            # of its column
    better = "higher"           # or "lower", or "neither"
    needs = ("images",)         # of NEEDS

    def compute(self, drawn: DrawnImages, reference: RealImages) -> tuple[float, float | None]:
        ...                     # its value, and its standard error where it is known
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.system.files import sha256_of
from stepdistill.system.python_files import module_of

NEEDS = {
    "features": "drawn.features",
    "images": "drawn.images",
    "prompts": "drawn.prompts",
    "reference": "reference.features",
}
"""What a metric can ask for, and where ``compute`` finds it. What it does not ask is None."""
BETTER = ("lower", "higher", "neither")
SHIPPED = ("colour_hits", "high_frequencies")
"""Metrics of this folder that have the same form: a suite names them without a path."""


@dataclass(frozen=True)
class DrawnImages:
    """The images that are measured, in the order of the suite's seeds.

    Attributes:
        count: N, how many.
        features: float32 [N, D] in the suite's feature network.
        images: batches uint8 [B, 3, H, W] in 0..255, in order; reading them again starts anew.
        prompts: N, prompt i of image i.
    """

    count: int
    features: Tensor | None = None
    images: Iterable[Tensor] | None = None
    prompts: Sequence[str] | None = None


@dataclass(frozen=True)
class RealImages:
    """The suite's reference. It holds no images.

    Attributes:
        count: M, how many real images it was made of.
        mean, covariance: float64 [D] and [D, D] of their features.
        features: float32 [M, D].
    """

    count: int
    mean: Tensor
    covariance: Tensor
    features: Tensor | None = None


@dataclass(frozen=True)
class OwnMetric:
    """A metric from a file.

    Attributes:
        file: where it lies.
        sha256: of the file: two reports compare only where it is equal.
        name: of its score.
        better: of BETTER.
        needs: keys of NEEDS.
        metric: the object whose ``compute`` is called.
    """

    file: Path
    sha256: str
    name: str
    better: str
    needs: frozenset[str]
    metric: Any

    def compute(self, drawn: DrawnImages, reference: RealImages) -> tuple[float, float | None]:
        """Its value and standard error.

        Raises:
            ValueError: it gave something else than a finite number and an error of 0 or more, or None.
        """
        found = self.metric.compute(drawn, reference)
        if not isinstance(found, tuple) or len(found) != 2:
            raise ValueError(
                f"compute gave {type(found).__name__}; it must give (value, standard error or None)"
            )
        value, error = float(found[0]), None if found[1] is None else float(found[1])
        if not math.isfinite(value) or (error is not None and not 0 <= error < math.inf):
            raise ValueError(f"compute gave {value:g} with the standard error {error}; both must be finite")
        return value, error


def metric_file(name: str, folder: Path) -> Path:
    """Where the metric lies that a suite in ``folder`` names: one of SHIPPED, or the user's file."""
    return Path(__file__).with_name(f"{name}.py") if name in SHIPPED else folder / Path(name).expanduser()


def load_metric(file: Path) -> OwnMetric:
    """The metric of a Python file, which is run.

    Raises:
        UserError: there is no such file, it does not run, or its class lacks something.
    """
    if not file.is_file():
        raise UserError(f"metric {file}: there is no such file; paths start at the suite's folder")
    return _load(file.resolve(), file.stat().st_mtime_ns)


@cache
def _load(file: Path, changed_ns: int) -> OwnMetric:
    module = module_of(str(file), "metric")
    classes = [
        kind
        for kind in vars(module).values()
        if inspect.isclass(kind) and kind.__module__ == module.__name__ and "compute" in vars(kind)
    ]
    if len(classes) != 1:
        names = ", ".join(kind.__name__ for kind in classes) or "none"
        raise UserError(f"metric {file}: it must hold one class with a function compute; found {names}")
    kind: Any = classes[0]
    if wrong := _problems(kind):
        raise UserError(f"metric {file}: class {kind.__name__}: {'; '.join(wrong)}")
    try:
        metric = kind()
    except Exception as error:
        raise UserError(
            f"metric {file}: {kind.__name__}() failed: {type(error).__name__}: {error}"
        ) from error
    return OwnMetric(file, sha256_of(file), kind.name, kind.better, frozenset(kind.needs), metric)


def _problems(kind: type) -> list[str]:
    """What a class lacks to be a metric."""
    said = vars(kind)
    name, better, needs = said.get("name"), said.get("better"), said.get("needs")
    wrong = []
    if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]*", name) or name.endswith("_se"):
        wrong.append(f"name is {name!r}: give small letters, digits and _, such as name = 'colours'")
    if better not in BETTER:
        wrong.append(f"better is {better!r}: give 'lower', 'higher' or 'neither'")
    if not isinstance(needs, (tuple, list, set, frozenset)) or not set(needs) <= NEEDS.keys():
        wrong.append(f"needs is {needs!r}: give a tuple of {', '.join(NEEDS)}, such as needs = ('images',)")
    try:
        inspect.signature(said["compute"]).bind(None, None, None)
    except TypeError:
        wrong.append("compute must take (self, drawn, reference)")
    return wrong
