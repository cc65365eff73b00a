"""Parts of gpu.py: short runs, plain and compiled, a DMD unit over its bare network passes, and a network compiled.
Each takes its argument and whether sizes are toys, and yields rows."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attention as bench
import torch
from gpu_device import CUDA, DEVICE, Row, alone

ASKED = {
    "dmd": "options.warm_start=0 options.fake_warm_start=0",
    "lcm": "options.pairs=128 options.pair_steps=2",
    "scm": "options.pairs=128 options.pair_steps=2 options.tangent_warmup=0 options.derivative=exact",
    "meanflow": "options.pairs=128 options.pair_steps=2 options.warm_start=0 options.derivative=exact",
    "reflow": "options.pairs=128 options.pair_steps=2 options.reflow_updates=10 options.flow_steps=2",
}
SHORT = "student.output=teacher train.warmup=0 train.preview_every=0 train.average=0.9 evaluate=false"


def toolkit(method: str, tiny: bool) -> Iterator[Row]:
    for precision in ("float32", "bf16"):
        yield _short_run(method, tiny, {"precision": precision})


def ways(_: str, tiny: bool) -> Iterator[Row]:
    for way in ("none",) if tiny else ("none", "graphs", "regional", "full"):
        yield _short_run("dmd", tiny, {"precision": "bf16", "compile": way})


def _short_run(method: str, tiny: bool, train: dict[str, str]) -> Row:
    """A run at the embedded teacher, with keys of its recipe's ``train``; the second half of its steps is timed."""
    import stepdistill
    from stepdistill.training import loop

    plain = loop.train

    def timed(*told: Any, **named: Any) -> Any:
        with alone():
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            return plain(*told, **named)

    steps, batch = (4, 2) if tiny else (24 if "compile" in train else 20, 64)
    row: Row = {"method": method, **train}
    loop.train = timed
    with tempfile.TemporaryDirectory() as folder:
        sets = [*SHORT.split(), *ASKED[method].split(), f"train.updates={steps}", f"train.batch={batch}"]
        began = time.perf_counter()
        try:
            run = stepdistill.distill(
                "emoji",
                method,
                Path(folder) / "run",
                sets=[*sets, *(f"train.{key}={value}" for key, value in train.items())],
            )
            assert run.report is not None
            row["peak MiB"] = (run.report.peak_memory_bytes or 0) / 2**20
            row["device"] = run.report.hardware
            row["verified"] = run.report.verification
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:400]
        finally:
            loop.train = plain
        if (log := Path(folder) / "run" / "stats.jsonl").is_file():  # also of a run that did not end well
            rows = [json.loads(x) for x in log.read_text().splitlines()]
            half = len(rows) // 2
            row["ms a step"] = (rows[-1]["seconds"] - rows[half - 1]["seconds"]) / (len(rows) - half) * 1e3
            row["first loss"], row["loss"] = rows[0]["loss"], rows[-1]["loss"]
        row["whole s"] = time.perf_counter() - began
    return row


def unit(_: str, tiny: bool) -> Iterator[Row]:
    for precision in ("float32", "bf16"):
        for batch in (2,) if tiny else (64, 512):
            try:
                yield unit_row(_emoji(batch, precision), batch, {"teacher": "emoji", "precision": precision})
            except Exception as error:
                yield {
                    "precision": precision,
                    "batch": batch,
                    "failed": f"{type(error).__name__}: {error}"[:400],
                }


def _emoji(batch: int, precision: str) -> Any:
    return assembled("emoji", None, batch, [f"train.precision={precision}"])


def assembled(teacher: str, pipeline: Any, batch: int, sets: list[str]) -> Any:
    from accelerate import Accelerator
    from step import TIMED, WARM

    from stepdistill.recipes.recipe import load_recipe
    from stepdistill.training.assemble import assemble
    from stepdistill.training.identity import resolve

    own = [*SHORT.split(), *ASKED["dmd"].split(), "options.fake_updates=1", f"train.batch={batch}"]
    recipe = load_recipe(
        method="dmd", teacher=teacher, sets=[*own, f"train.updates={2 * (WARM + TIMED)}", *sets]
    )
    return assemble(resolve(recipe), Accelerator(cpu=not CUDA), pipeline)


def unit_row(job: Any, batch: int, row: Row, waits: bool = True) -> Row:
    """Seconds of a unit of one student and one fake update, of its bare passes, its peak and what it waits for."""
    from step import TIMED, WARM, bare_seconds, trained_parameters, unit_seconds

    from stepdistill.training.run import Run

    Run.save = lambda self: None  # type: ignore[method-assign]  # nothing here is resumed
    trained = trained_parameters(job)
    with tempfile.TemporaryDirectory() as folder:
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        took = unit_seconds(job, job.accelerator, Path(folder), 1)
        row |= {"batch": batch, "unit ms": took * 1e3}
        if CUDA:
            row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
        bare = [bare_seconds(job, trained, batch, 1) for _ in range(4)]
        row |= {"bare ms": statistics.median(bare[1:]) * 1e3, "ratio": took / statistics.median(bare[1:])}
        if CUDA and waits:
            found = _waits(job, lambda: unit_seconds(job, job.accelerator, Path(folder), 1))
            steps = 2 * (WARM + TIMED) - UNCOUNTED
            row["waits a step"] = sum(found.values()) / steps
            row["where"] = "; ".join(f"{place} {count / steps:.1f}" for place, count in found.most_common())
    return row


UNCOUNTED = 2
"""Steps at the start of a run, which also encode conditions and make the optimisers' state."""


def _waits(job: Any, call: Callable[[], Any]) -> Counter[str]:
    """How often the later steps of a run made the processor wait for the GPU, by the line of ours that did."""
    seen: Counter[str] = Counter()
    plain = job.objective.turn

    def turn(step: int) -> Any:
        if step == UNCOUNTED:
            seen.clear()
        return plain(step)

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing" not in str(message):
            return
        frame = sys._getframe(1)
        while frame is not None and "/stepdistill/" not in frame.f_code.co_filename:
            frame = frame.f_back  # type: ignore[assignment]
        seen[f"{Path(frame.f_code.co_filename).stem}:{frame.f_lineno}" if frame else "elsewhere"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        job.objective.turn = turn
        try:
            call()
        finally:
            del job.objective.turn
            torch.cuda.set_sync_debug_mode("default")
    return seen


def draws(_: str, tiny: bool) -> Iterator[Row]:
    """Random numbers of training, drawn here and by the processor's numpy, and the time of a batch of SDXL's noise."""
    from stepdistill.diffusion.draws import Draws, normal_of

    processor, here = torch.device("cpu"), DEVICE
    shape = (4, 8, 8) if tiny else (4, 128, 128)

    def drawn(device: torch.device, count: int = 7) -> dict[str, torch.Tensor]:
        own = Draws(seed=3, step=2**31 + 5, first=2**20 - 3, count=count, device=device)
        samples = torch.tensor([0, 2**31, 5], device=device)
        return {
            "normal": own.normal("noise", shape),
            "normal, odd": own.normal("noise", (3, 5)),
            "normal of samples": normal_of(3, "noise", samples, (5, 7), device),
            "uniform": own.uniform("time", -0.3, 1.7),
            "integers": own.integers("index", 2**32 - 7),
        }

    theirs, ours = drawn(processor), drawn(here)
    for name, value in theirs.items():
        other = ours[name].cpu()
        apart = float((value.double() - other.double()).abs().max())
        yield {
            "draw": name,
            "device": here.type,
            "equal bits": bool(torch.equal(value, other)),
            "apart": apart,
        }
    for batch in (1, 64):
        own = Draws(seed=3, step=1, first=0, count=batch, device=here)
        took = statistics.median(bench._seconds(lambda: own.normal("noise", shape), here) for _ in range(20))  # noqa: B023
        yield {"draw": f"normal, {batch} of {shape}", "device": here.type, "ms": took * 1e3}


PARTS: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    "toolkit": toolkit,
    "draws": draws,
    "unit": unit,
    "ways": ways,
}
