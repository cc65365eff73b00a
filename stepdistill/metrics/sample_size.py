"""Whether a metric is to be trusted at a number of images, and if not, why."""

from __future__ import annotations

ENOUGH_NEIGHBOURS = 5000
ENOUGH_CLASSES = 5000
ENOUGH_PAIRS = 100
PER_DIMENSION = 5
ENOUGH_FRECHET = 10_000
"""Images for a Frechet distance: 5 a dimension, and 10,000 whatever the dimension."""


def too_few(metric: str, count: int, dimension: int) -> str | None:
    """The warning for a metric of ``count`` images in ``dimension`` features, None where the number is enough.

    Args:
        metric: ``fd`` (FID and every other Frechet distance), ``sfid``, ``fid_infinity``, ``kid``, ``cmmd``,
            ``inception_score``, ``precision``, ``recall``, ``density``, ``coverage`` or, for these four at once,
            ``neighbours``.
        count: N, the drawn images.
        dimension: D of the features.

    Raises:
        ValueError: there is no such metric.
    """
    if metric in ("fd", "sfid"):
        return _frechet(metric, count, dimension)
    if metric == "fid_infinity":
        if count // 6 > dimension:
            return None
        return (
            f"fid_infinity of {count} images: its smallest part has {count // 6} images for {dimension} features, "
            f"where the distance is no line over 1/N yet; take {6 * (dimension + 1):,} or more"
        )
    if metric in ("precision", "recall", "density", "coverage", "neighbours"):
        if count >= ENOUGH_NEIGHBOURS:
            return None
        name = "precision, recall, density, coverage" if metric == "neighbours" else metric
        return (
            f"{name} of {count} images: the balls to the nearest neighbours shrink with N: compare only at "
            f"equal N; the literature takes {ENOUGH_NEIGHBOURS:,} or more"
        )
    if metric == "inception_score":
        if count >= ENOUGH_CLASSES:
            return None
        return (
            f"inception_score of {count} images: it grows with N, as a tenth of the images must stand for all classes; "
            f"take {ENOUGH_CLASSES:,} or more"
        )
    if metric in ("kid", "cmmd"):
        if count >= ENOUGH_PAIRS:
            return None
        return f"{metric} of {count} images: look at its standard error, it may be as large as the value"
    raise ValueError(f"{metric} is no metric whose number of images is judged")


def _frechet(metric: str, count: int, dimension: int) -> str | None:
    enough = min(PER_DIMENSION * dimension, ENOUGH_FRECHET)
    if count <= dimension:
        return (
            f"{metric} of {count} images in {dimension} features: their covariance is singular and the distance far "
            f"too large; take {enough:,} or more, or read kid"
        )
    if count < enough:
        return (
            f"{metric} of {count} images in {dimension} features: too large by a constant over N that differs between "
            f"models, so it compares only at equal N; take {enough:,} or more, or read kid"
        )
    return None
