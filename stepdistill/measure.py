"""Every score of a suite, from the rows of its images and the reference. No image is seen here."""

from __future__ import annotations

from stepdistill.errors import UserError
from stepdistill.features import FeatureNetwork
from stepdistill.metrics.balls import Balls
from stepdistill.metrics.coverage import coverage
from stepdistill.metrics.density import density
from stepdistill.metrics.frechet import Moments, frechet_distance, frechet_distance_of_features
from stepdistill.metrics.kid import kernel_distance
from stepdistill.metrics.precision import precision
from stepdistill.metrics.recall import recall
from stepdistill.row_table import RowTable
from stepdistill.scores import Scores
from stepdistill.suite import Reference, Suite


def measure(rows: RowTable, suite: Suite, network: FeatureNetwork, reference: Reference) -> Scores:
    """The scores of images.

    Args:
        rows: of the images, as :class:`stepdistill.extraction.Extraction` makes them.
        suite: which scores.
        network: that made ``features``.
        reference: its statistics of the real images.

    Raises:
        UserError: fewer than 3 images.
    """
    if rows.count < 3:
        raise UserError(f"a distance needs at least 3 images, there are {rows.count}")
    if rows.count <= network.dimension:  # the covariance is singular
        distance = frechet_distance_of_features(rows.whole("features"), reference.moments)
    else:
        moments = Moments.empty(network.dimension)
        for block in rows.blocks("features"):
            moments.add(block)
        distance = frechet_distance(moments, reference.moments)
    kid = balls = None
    if reference.features is not None:
        if suite.kid:
            kid = kernel_distance(rows.whole("features"), reference.features, gamma=network.kernel_scale)
        if rows.count > suite.neighbours > 0:
            balls = Balls.between(reference.features, rows.whole("features"), suite.neighbours)
    return Scores(
        n=rows.count,
        fd=network.fd_scale * distance,
        kid=None if kid is None else kid.value,
        kid_se=None if kid is None else kid.standard_error,
        clip_score=float(rows.whole("clip_score").double().mean()) if "clip_score" in rows else None,
        precision=precision(balls) if balls else None,
        recall=recall(balls) if balls else None,
        density=density(balls) if balls else None,
        coverage=coverage(balls) if balls else None,
    )
