"""Scores of images that are there already, in a folder, an archive or an iterator."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.data.image_archives import open_images
from stepdistill.data.image_sources import ImageSource
from stepdistill.errors import UserError
from stepdistill.evaluation.extraction import Extraction
from stepdistill.evaluation.folder import steps_folder, write_results
from stepdistill.evaluation.gallery import FILE as GALLERY
from stepdistill.evaluation.gallery import Pictures, make_gallery, side_of
from stepdistill.evaluation.measure import measure
from stepdistill.evaluation.reference import load_reference
from stepdistill.evaluation.scores import Report, Scores, StepScores
from stepdistill.evaluation.shards import MANIFEST, ShardWriter
from stepdistill.evaluation.statement import statement, tell
from stepdistill.evaluation.suite import Suite, load_suite
from stepdistill.system.files import check_writable
from stepdistill.system.log import bar, say
from stepdistill.system.memory import peak_memory
from stepdistill.system.prefetch import ahead
from stepdistill.system.provenance import provenance


def evaluate_images(
    images: str | Path | Iterable[Any],
    suite: str | Path | Suite,
    *,
    batch: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
    output: str | Path | None = None,
    workers: int | None = None,
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
        output: folder for report.json, report.md, report.html and the gallery.
        workers: processes that decode; see :func:`stepdistill.data.image_archives.open_images`.

    Raises:
        UserError: the images or the reference cannot be read, there are fewer or more images than the suite asks, or an
            image with a prompt cannot be used.
    """
    suite = load_suite(suite)
    folder = None if output is None else Path(output)
    if folder is not None:
        if any(folder.glob(f"steps_*/{MANIFEST}")):
            raise UserError(f"{folder} holds the evaluation of a pipeline: give another --output")
        check_writable(folder)
    source = open_images(images, resolution=suite.resolution, workers=workers)
    if suite.n and source.found not in (None, suite.n):
        raise UserError(
            f"{source.label} holds {source.found} images, suite {suite.label} asks {suite.n}: "
            "give exactly as many, or a suite with another n"
        )
    prompts = suite.prompt_list() if suite.reads_prompts else None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    suite.reference_file()  # its absence is told before anything is loaded
    extraction = Extraction(suite, device)
    reference = load_reference(suite, extraction.network)
    kept = Pictures(side_of(suite.resolution))
    pinned = torch.device(device).type == "cuda"
    drawn = ahead(
        _all(suite.n, source, source.numbered(batch, ordered=prompts is not None, pinned=pinned)),
        depth=source.ahead,
    )
    with tempfile.TemporaryDirectory(prefix="stepdistill-") as place:
        rows = ShardWriter(Path(place))
        try:
            with (
                closing(drawn),
                bar(source.found, f"{suite.label}, {source.label}", unit="image", shown=progress) as shown,
            ):
                for places, pixels in drawn:
                    found = extraction(pixels, None if prompts is None else [prompts[i] for i in places])
                    rows.add(found, places)
                    if folder is not None:
                        kept.add(places, pixels, found.get("clip_score"))
                    shown.update(len(pixels))
        finally:
            for line in source.remarks():
                say(line)
        table = rows.table()
        scores = measure(table, suite, extraction.network, reference, device, prompts, extraction.second)
        if folder is not None:
            file = steps_folder(folder, 0) / GALLERY
            file.parent.mkdir(parents=True, exist_ok=True)
            make_gallery(table, kept.kept(), prompts).save(file)
    suite = extraction.suite = suite.changed({"n": scores.n})
    memory = peak_memory(torch.device(device))
    report = Report(
        suite=suite.label,
        pipeline=source.label,
        n=scores.n,
        guidance=None,
        trailing=False,
        scores={
            0: StepScores(
                **asdict(scores), seconds_per_image=0.0, network_evaluations=0.0, peak_memory_bytes=memory
            )
        },
        **statement(extraction, scores),
        **provenance(device),
        images=source.account(),
    )
    tell(report)
    if folder is not None:
        write_results(report, folder, suite)
    return report


def _all(
    n: int, source: ImageSource, batches: Iterator[tuple[list[int], Tensor]]
) -> Iterator[tuple[list[int], Tensor]]:
    """The source's images, which must be n where n is not 0."""
    for places, pixels in batches:
        if n and source.used > n:
            raise UserError(f"{source.label} gives more than the {n} images that the suite asks: give {n}")
        yield places, pixels
    if n and source.used < n:
        why = (
            f"{source.skipped[-1].name}: {source.skipped[-1].reason}"
            if source.skipped
            else "there are no more"
        )
        raise UserError(
            f"{source.label}: {source.used} of the {n} images that the suite asks can be used ({why})"
        )


def score_images(
    images: Iterable[Tensor],
    prompts: Sequence[str] | None,
    suite: str | Path | Suite,
    *,
    device: torch.device | str = "cpu",
) -> Scores:
    """Score images that are already there, in the suite's features and against its reference.

    Args:
        images: batches uint8 [B, 3, H, W], of any number in all (a different n than the suite's is another protocol).
        prompts: one per image, in order; None for a suite without CLIP score.
        suite: the protocol.
        device: where the features are computed.
    """
    suite = load_suite(suite)
    extraction = Extraction(suite, device)
    reference = load_reference(suite, extraction.network)
    with tempfile.TemporaryDirectory(prefix="stepdistill-") as folder:
        rows = ShardWriter(Path(folder))
        for pixels in images:
            texts = None if prompts is None else prompts[rows.count : rows.count + len(pixels)]
            rows.add(extraction(pixels, texts))
        return measure(rows.table(), suite, extraction.network, reference, device, prompts, extraction.second)
