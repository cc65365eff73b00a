"""Scores of images that are there already, in a folder, an archive or an iterable, by the code that scores others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.evaluate import score_images
from stepdistill.image_sources import ImageSource, open_images
from stepdistill.log import bar, say
from stepdistill.provenance import provenance
from stepdistill.scores import Report, StepScores
from stepdistill.suite import Suite, load_suite


def evaluate_images(
    images: str | Path | Iterable[Any],
    suite: str | Path | Suite,
    *,
    batch: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Report:
    """Score the images of a folder, a zip, an npz, a webdataset tar or an iterable; see ``image_sources``.

    Images of another size than the suite's resolution are cropped to their central square and resized with PIL's
    Lanczos filter. For the CLIP score, image i in the order of names belongs to prompt i of the suite. What was
    converted and skipped stands in the report's ``images`` and, in short, on stderr.

    Args:
        images: a path, or an iterable of PIL images and arrays uint8 [H, W, 3].
        suite: the protocol; where its n is 0, all images count.
        batch: images whose features are computed at a time. Scores do not depend on it.
        device: where the features are computed; None is CUDA if there is one.
        progress: show a bar.

    Raises:
        UserError: the images or the reference cannot be read, there are fewer or more images than the suite asks, or an
            image with a prompt cannot be used.
    """
    suite = load_suite(suite)
    source = open_images(images, resolution=suite.resolution)
    if suite.n and source.found not in (None, suite.n):
        raise UserError(
            f"{source.label} holds {source.found} images, suite {suite.label} asks {suite.n}: "
            "give exactly as many, or a suite with another n"
        )
    prompts = suite.prompt_list() if suite.clip_score else None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    suite.reference_file()  # its absence is told before anything is loaded
    try:
        with bar(source.found, f"{suite.label}, {source.label}", unit="image", shown=progress) as shown:
            pixels = _all(suite.n, source, source.batches(batch, ordered=prompts is not None), shown)
            found = score_images(pixels, prompts, suite, device=device)
    finally:
        for line in source.remarks():
            say(line)
    suite, network = suite.changed({"n": found.n}), suite.network(device)
    return Report(
        suite=suite.label,
        pipeline=source.label,
        n=found.n,
        guidance=None,
        trailing=False,
        scores={0: StepScores(**asdict(found), seconds_per_image=0.0, network_evaluations=0.0)},
        metrics={"fd": network.fd_name, "clip_score": network.clip_name if suite.clip_score else None},
        protocol=suite.protocol(network),
        **provenance(device),
        images=source.account(),
    )


def _all(n: int, source: ImageSource, batches: Iterator[Tensor], shown: Any) -> Iterator[Tensor]:
    """The source's images, which must be n where n is not 0; moves the bar."""
    for pixels in batches:
        if n and source.used > n:
            raise UserError(f"{source.label} gives more than the {n} images that the suite asks: give {n}")
        yield pixels
        shown.update(len(pixels))
    if n and source.used < n:
        why = (
            f"{source.skipped[-1].name}: {source.skipped[-1].reason}"
            if source.skipped
            else "there are no more"
        )
        raise UserError(
            f"{source.label}: {source.used} of the {n} images that the suite asks can be used ({why})"
        )
