"""Every score of a suite, from the rows of its images and the reference. No image is seen here.

Rows are read in blocks of a fixed number, in the order of the images, so that a score does not depend on the batches
in which they were made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.errors import UserError, first_line
from stepdistill.evaluation.reference_files import Reference
from stepdistill.evaluation.rows import RowTable
from stepdistill.evaluation.scores import Scores
from stepdistill.evaluation.suite import Suite
from stepdistill.features.network import FeatureNetwork
from stepdistill.metrics.cmmd import cmmd
from stepdistill.metrics.fid_infinity import fid_infinity
from stepdistill.metrics.float64 import float64_device
from stepdistill.metrics.frechet import Moments, frechet_distance, frechet_distance_of_features
from stepdistill.metrics.frechet_error import GROUPS, frechet_estimate
from stepdistill.metrics.inception_score import inception_score
from stepdistill.metrics.kid import kernel_distance
from stepdistill.metrics.own import NEEDS, DrawnImages, OwnMetric, RealImages
from stepdistill.metrics.prdc import Balls, coverage, density, precision, recall
from stepdistill.metrics.standard_errors import from_leaving_out, of_mean
from stepdistill.pictures.given import words_of

BLOCK = 400 * GROUPS
"""Rows held at a time; a multiple of the groups, so that every block starts with group 0."""
CHEAP = 256
"""Features of a Frechet distance whose standard error is always computed: 20 more distances cost a second at most. Of
2,048 features they cost half a minute, and are computed where the suite asks ``intervals``."""
INFINITY_GROUPS = 10
SPLITS = 10
ERRORS = (
    f"fd, second_fd, sfid, recall, coverage: jackknife over {GROUPS} random groups; fid_infinity: over "
    f"{INFINITY_GROUPS}; kid, cmmd: jackknife over drawn images; inception_score: deviation between {SPLITS} splits; "
    "the others: of a mean"
)
"""How standard errors are computed, for reports."""

Found = dict[str, float | None]


def measure(
    rows: RowTable,
    suite: Suite,
    network: FeatureNetwork | None,
    reference: Reference,
    device: torch.device | str = "cpu",
    prompts: Sequence[str] | None = None,
    second: FeatureNetwork | None = None,
) -> Scores:
    """The scores of images: those that the suite asks and whose rows are there.

    Args:
        rows: of the images, as :class:`stepdistill.evaluation.extraction.Extraction` makes them.
        suite: which scores.
        network: that made ``features``; None where its weights are missing.
        reference: its statistics of the real images.
        device: where distances are computed, in float64; a device without it leaves them on the CPU.
        prompts: one an image, for your own metrics that need them.
        second: that made ``second_features``; None where there are none.

    Raises:
        UserError: fewer than 3 images.
    """
    count = rows.count
    if count < 3:
        raise UserError(f"a distance needs at least 3 images, there are {count}")
    found: Found = {}
    device = float64_device(device)
    rows, reference = rows.on(device), reference.on(device)
    if network is not None and "features" in rows:
        found |= _in_features(rows, suite, network, reference)
    if "spatial" in rows and reference.spatial is not None:
        found["sfid"], found["sfid_se"] = _distance(rows, "spatial", reference.spatial, suite.intervals)
    if "logits" in rows and "inception_score" not in too_few_for(suite, count):
        score = inception_score(in_random_order(rows.whole("logits")), splits=SPLITS)
        found |= {"inception_score": score.value, "inception_score_deviation": score.deviation}
    embedding = "features" if suite.cmmd == suite.features else "clip_embedding"
    if suite.cmmd is not None and embedding in rows and reference.embeddings is not None:
        discrepancy = cmmd(rows.whole(embedding), reference.embeddings)
        found |= {"cmmd": discrepancy.value, "cmmd_se": discrepancy.standard_error}
    if second is not None and "second_features" in rows and reference.second is not None:
        with_error = suite.intervals or second.dimension <= CHEAP
        distance, error = _distance(rows, "second_features", reference.second, with_error)
        found["second_fd"] = second.fd_scale * distance
        found["second_fd_se"] = None if error is None else second.fd_scale * error
    for name in ("clip_score", "pick_score", "aesthetic", "second_fit"):
        if name in rows:
            found |= _mean(name, rows.whole(name))
    own, missing = _own_metrics(suite.own_metrics(), rows, reference, prompts)
    return Scores(n=count, own=own, own_missing=missing, **found)


def _own_metrics(
    metrics: Sequence[OwnMetric], rows: RowTable, reference: Reference, prompts: Sequence[str] | None
) -> tuple[Found, dict[str, str]]:
    """Values and errors of your own metrics, and why others have none: an error in one is no end of an evaluation."""
    found: Found = {}
    missing: dict[str, str] = {}
    moments = reference.moments
    for metric in metrics:
        drawn = DrawnImages(
            rows.count,
            rows.whole("features") if "features" in metric.needs and "features" in rows else None,
            _Batches(rows, "images") if "images" in metric.needs else None,
            words_of(prompts) if prompts is not None and "prompts" in metric.needs else None,
        )
        known = reference.features if "reference" in metric.needs else None
        real = RealImages(moments.count, moments.mean, moments.covariance, known)
        there = {
            "features": drawn.features,
            "images": drawn.images,
            "prompts": drawn.prompts,
            "reference": known,
        }
        if lacking := [need for need in NEEDS if need in metric.needs and there[need] is None]:
            missing[metric.name] = f"{metric.file.name} needs {', '.join(lacking)}, which are not here"
            continue
        try:
            found[metric.name], found[f"{metric.name}_se"] = metric.compute(drawn, real)
        except Exception as error:  # whatever the user's file does
            missing[metric.name] = f"{metric.file.name}: {first_line(error)}"
    return found, missing


@dataclass(frozen=True)
class _Batches:
    """The rows of a name, some at a time; reading them again starts anew."""

    rows: RowTable
    name: str

    def __iter__(self) -> Iterator[Tensor]:
        return self.rows.blocks(self.name)


def too_few_for(suite: Suite, count: int) -> dict[str, str]:
    """The metrics that a suite asks and that have no value at so few images, and why."""
    found = {}
    if 0 < count <= suite.neighbours:
        for name in ("precision", "recall", "density", "coverage"):
            found[name] = (
                f"{name} to the nearest {suite.neighbours} needs more than so many images, there are {count}"
            )
    if suite.fid_infinity and count < 12:
        found["fid_infinity"] = f"fid_infinity needs 12 images, there are {count}"
    if suite.inception_score and count < SPLITS:
        found["inception_score"] = (
            f"inception_score of {SPLITS} splits needs that many images, there are {count}"
        )
    return found


def _in_features(rows: RowTable, suite: Suite, network: FeatureNetwork, reference: Reference) -> Found:
    """The scores in the suite's own features."""
    count, few = rows.count, too_few_for(suite, rows.count)
    with_error = suite.intervals or network.dimension <= CHEAP
    distance, error = _distance(rows, "features", reference.moments, with_error)
    found: Found = {
        "fd": network.fd_scale * distance,
        "fd_se": None if error is None else network.fd_scale * error,
    }
    if suite.fid_infinity and "fid_infinity" not in few:
        enough = count >= 24  # parts of what is left without a group need two images each
        groups = INFINITY_GROUPS if with_error and enough else 0
        end = fid_infinity(rows.whole("features"), reference.moments, groups=groups).value
        found["fid_infinity"] = network.fd_scale * end.value
        found["fid_infinity_se"] = network.fd_scale * end.standard_error if groups else None
    if reference.features is None:
        return found
    if suite.kid:
        kid = kernel_distance(rows.whole("features"), reference.features, gamma=network.kernel_scale)
        found |= {"kid": kid.value, "kid_se": kid.standard_error}
    if suite.neighbours and "recall" not in few:
        groups = min(GROUPS, count) if count - -(-count // GROUPS) > suite.neighbours else 0
        drawn = in_random_order(rows.whole("features"))
        balls = Balls.between(reference.features, drawn, suite.neighbours, groups=groups)
        found |= _mean("precision", balls.holding > 0) | {"precision": precision(balls)}
        found |= _mean("density", balls.holding / balls.nearest) | {"density": density(balls)}
        found |= _left_out("recall", recall(balls), balls.covered_without)
        found |= _left_out("coverage", coverage(balls), balls.reached_without)
    return found


def _mean(name: str, values: Tensor) -> Found:
    estimate = of_mean(values)
    return {name: estimate.value, f"{name}_se": estimate.standard_error}


def _left_out(name: str, value: float, without: Tensor) -> Found:
    """A mean over real images, and the jackknife's error from those without each group of drawn images [G, M]."""
    if not len(without):
        return {name: value, f"{name}_se": None}
    estimate = from_leaving_out(value, without.double().mean(1))
    return {name: value, f"{name}_se": estimate.standard_error}


def _distance(rows: RowTable, name: str, reference: Moments, with_error: bool) -> tuple[float, float | None]:
    """The Frechet distance of the rows of a name and, where it is asked for, its standard error."""
    dimension = len(reference.total)
    if rows.count <= dimension:  # the covariance is singular, and the features are few
        features = in_random_order(rows.whole(name))
        value = frechet_distance_of_features(features, reference)
        if not with_error:
            return value, None
        count = min(GROUPS, len(features))
        member = torch.arange(len(features)) % count
        without = [frechet_distance_of_features(features[member != i], reference) for i in range(count)]
        return value, from_leaving_out(value, torch.tensor(without)).standard_error
    groups = [Moments.empty(dimension, reference.total.device) for _ in range(GROUPS if with_error else 1)]
    for block in _blocks(rows, name):
        mixed = in_random_order(block) if with_error else block
        for place, group in enumerate(groups):
            group.add(mixed[place :: len(groups)])
    if not with_error:
        return frechet_distance(groups[0], reference), None
    estimate = frechet_estimate(groups, reference)
    return estimate.value, estimate.standard_error


def in_random_order(rows: Tensor) -> Tensor:
    """Rows [N, ...] in an order that is the same every time: every 20th of them is then a random group, and a tenth of
    them a random split, also where the images have a pattern, as classes that take turns or folders of one class."""
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def _blocks(rows: RowTable, name: str) -> Iterator[Tensor]:
    """The rows of a name, BLOCK at a time whatever the batches were."""
    held: list[Tensor] = []
    for block in rows.blocks(name):
        held.append(block)
        while sum(map(len, held)) >= BLOCK:
            joined = torch.cat(held)
            yield joined[:BLOCK]
            held = [joined[BLOCK:]]
    if sum(map(len, held)):
        yield torch.cat(held)
