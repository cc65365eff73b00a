"""A process's part of an evaluation: it draws shards of a suite's images and keeps what the networks say of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from itertools import chain, islice

import torch
from torch import Tensor

from stepdistill.evaluation.drawing import Drawing
from stepdistill.evaluation.gallery import Pictures
from stepdistill.evaluation.rows import Rows
from stepdistill.evaluation.shards import Cost, Shards
from stepdistill.system.memory import peak_memory
from stepdistill.system.prefetch import ahead


def draw_shards(
    shards: Shards,
    numbers: Iterable[int],
    drawing: Drawing,
    rows_of: Callable[[Tensor, Sequence[str] | None], Rows],
    prompts: Sequence[str] | None,
    *,
    steps: int,
    batch: int,
    side: int,
    device: torch.device,
    processes: int = 1,
    advance: Callable[[int], None] = lambda images: None,
) -> None:
    """Draw shards and write them. The next batch is drawn while the networks look at the present one.

    Args:
        shards: of the suite's images.
        numbers: of the shards to draw, this process's.
        drawing: of the suite with a pipeline.
        rows_of: the suite's networks, from pixels uint8 [B, 3, H, W] and their prompts.
        prompts: one an image; None for a suite without.
        steps: step count.
        batch: images at a time.
        side: of the pictures that are kept for the gallery; 0 keeps none.
        device: where the pipeline is.
        processes: that draw at the same time.
        advance: called with the number of images of the shard in making that are done.
    """
    warm = False
    for number in numbers:
        indices = shards.ranges[number]
        kept, rows, done = Pictures(side), list[Rows](), indices.start
        drawn = ahead(_with_seconds(drawing, device, steps, batch, indices))
        with closing(drawn):
            # While these are drawn nothing else runs, so that they tell what drawing alone takes. The very first batch
            # of a process also pays for warming up, so it counts only where there is no other.
            alone = list(islice(drawn, 1 if warm else 2))
            timed = alone if warm or len(alone) == 1 else alone[1:]
            warm = True
            for pixels, _ in chain(alone, drawn):
                texts = None if prompts is None else prompts[done : done + len(pixels)]
                rows.append(rows_of(pixels, texts))
                if side:
                    kept.add(range(done, done + len(pixels)), pixels, rows[-1].get("clip_score"))
                done += len(pixels)
                advance(done - indices.start)
        seconds = sum(taken for _, taken in timed)
        cost = Cost(
            timed=sum(len(pixels) for pixels, _ in timed),
            seconds=seconds,
            share=seconds / processes,
            passes=drawing.passes,
            peak_memory_bytes=peak_memory(device),
        )
        whole = {name: torch.cat([some[name] for some in rows]) for name in rows[0]}
        shards.write(number, whole, cost, kept.kept())
        advance(0)


def _with_seconds(
    drawing: Drawing, device: torch.device, steps: int, batch: int, indices: range
) -> Iterator[tuple[Tensor, float]]:
    """The batches with the seconds that drawing each took; ``device`` is the current one of the thread that makes
    them."""
    before = 0.0
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for pixels in drawing.batches(steps, batch, indices):
            yield pixels, drawing.seconds - before
            before = drawing.seconds
