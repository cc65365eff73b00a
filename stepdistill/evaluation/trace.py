"""What pipelines predict at each step: the clean samples of the same noises, side by side, and two numbers a step.

How far the clean prediction is from the last one, mean|x0(t) - x0(end)|, says when a picture is settled; the pairwise
diversity of x0(t) over seeds says where variety is lost (DT-visualisation of Gandikota and Bau, 2025, 2503.10637).
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.path import Path as NoisePath
from stepdistill.diffusion.path import TrigPath
from stepdistill.errors import UserError
from stepdistill.evaluation.sample import call_arguments, draws_alone
from stepdistill.export.checks import times_asked
from stepdistill.export.schedulers import stock_scheduler
from stepdistill.families import Family, known_family
from stepdistill.families.size import Size
from stepdistill.families.watching import watch
from stepdistill.features.load import load_features
from stepdistill.metrics.diversity import pairwise_diversity
from stepdistill.networks.codec import Codec
from stepdistill.networks.find import find_pipeline
from stepdistill.networks.loading import load_pipeline
from stepdistill.networks.own_call import own_call, steps_of
from stepdistill.networks.pictures import strip, to_uint8
from stepdistill.networks.sampler import Sampler, schedule_times
from stepdistill.networks.scheduler_path import path_of
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.pages.html import document
from stepdistill.pages.picture_rows import STYLE as ROWS_STYLE
from stepdistill.pages.picture_rows import picture_rows
from stepdistill.pages.plots import Series, line_plot
from stepdistill.pages.sheets import png_of_rows, read_sheet
from stepdistill.system.files import written_whole
from stepdistill.system.log import bar
from stepdistill.system.travelling import travelling_module

COLUMNS = 12
"""Most steps of a pipeline that are shown; of more, so many evenly spread ones, the first and the last among them."""


@dataclass(frozen=True)
class Traced:
    """A pipeline's clean predictions.

    Attributes:
        name: of the pipeline.
        times: t of each step, 1 is noise.
        pictures: of the steps that are shown, uint8 [P, M, S', 3, H, W] of P prompts and M seeds.
        shown: numbers of those steps.
        moving: at each step mean|x0(t) - x0(end)| of the pictures' values in [0, 1].
        diversity, error: at each step the pairwise diversity over seeds, and its standard error over prompts.
    """

    name: str
    times: Sequence[float]
    pictures: Tensor
    shown: Sequence[int]
    moving: Sequence[float]
    diversity: Sequence[float]
    error: Sequence[float]


@dataclass(frozen=True)
class Asked:
    """A pipeline that is to be traced: everything cheap is checked.

    Attributes:
        name: as it was given.
        folder: of it.
        steps: of its draw.
        guidance: its scale, where it is no student.
    """

    name: str
    folder: Path
    steps: int
    guidance: float | None


def asked(pipelines: Sequence[str], steps: int | None, guidance: float | None) -> list[Asked]:
    """The pipelines by their names; ``steps`` and ``guidance`` are of those that are no students.

    Raises:
        UserError: one is no pipeline, or named twice.
    """
    if len(set(pipelines)) < len(pipelines):
        raise UserError("trace: a pipeline is named twice: give each once")
    found = []
    for name in pipelines:
        folder = find_pipeline(name)
        own = own_call(folder)
        found.append(Asked(name, folder, steps_of(own, steps if own is None else None), guidance))
    return found


def trace(
    pipelines: Sequence[Asked],
    prompts: Sequence[str],
    seeds: int,
    folder: Path,
    features: str,
    device: Any = None,
) -> list[Traced]:
    """Traces pipelines and writes trace.html, trace.png and trace.json into a folder.

    Args:
        pipelines: one row each.
        prompts: what is drawn.
        seeds: 0, 1 ... of each prompt, the same noises in every pipeline of one shape.
        folder: where to.
        features: the network in which diversity is measured.
        device: None takes a GPU where there is one.

    Raises:
        UserError: a pipeline that cannot be traced.
    """
    shown = bar(len(pipelines) * len(prompts), "trace", unit="draw")
    found = [_traced(each, prompts, seeds, features, device, shown.update) for each in pipelines]
    shown.close()
    folder.mkdir(parents=True, exist_ok=True)
    sheets = [_sheet(found, prompt, number) for number, prompt in enumerate(prompts)]
    (folder / "trace.png").write_bytes(sheets[0])
    numbers = [
        {
            "name": each.name,
            "t": list(each.times),
            "moving": list(each.moving),
            "diversity": list(each.diversity),
            "diversity_se": list(each.error),
        }
        for each in found
    ]
    about = {"prompts": list(prompts), "seeds": seeds, "features": features, "pipelines": numbers}
    page = _page(found, sheets, prompts, seeds)
    for name, text in (("trace.json", json.dumps(about, indent=1) + "\n"), ("trace.html", page)):
        with written_whole(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return found


def _traced(one: Asked, prompts: Sequence[str], seeds: int, features: str, device: Any, told: Any) -> Traced:
    """One pipeline's, prompt by prompt."""
    pipe, _ = load_pipeline(one.folder, device)
    family, own = known_family(type(pipe).__name__), own_call(one.folder)
    if family is None:
        raise UserError(f"trace: {one.name} is a {type(pipe).__name__}, whose states are not known here")
    scheduler = None
    if own is None:
        teacher = PipelineTeacher(pipe)
        even = Sampler(schedule_times(teacher.path, one.steps), renoise=False)
        scheduler = stock_scheduler(even, teacher.path, pipe.scheduler, family.passes)
    sides = {**(own.arguments if own else {})}
    size = family.default_size(pipe)
    if {"height", "width"} <= sides.keys():
        size = Size(int(sides["height"]), int(sides["width"]), int(sides.get("num_frames", size.frames)))
    codec = Codec(pipe, family, size, pipe.device)
    network = load_features(features, device=pipe.device)
    pictures, times, rows = [], list[float](), list[Tensor]()
    for prompt in prompts:
        at_once, parts = 1 if draws_alone(pipe, own, prompts) else seeds, list[list[Tensor]]()
        for first in range(0, seeds, at_once):
            scale = one.guidance if own is None else None
            call = call_arguments(pipe, own, [prompt] * at_once, one.steps, scale)
            own_seeds = range(first, first + at_once)
            call["generator"] = [torch.Generator().manual_seed(seed) for seed in own_seeds]
            seen = watch(pipe, {**call, "output_type": "np"}, scheduler=scheduler)
            if seen.copies:
                raise UserError(
                    f"trace: {one.name} is a {type(pipe).__name__}, which steps more than what is seen"
                )
            times, part = clean_predictions(seen, family, codec.shape, at_once)
            parts.append(part)
        states = [torch.cat(step) for step in zip(*parts, strict=True)]
        with torch.no_grad():
            frames = [strip(codec.to_frames(each.to(pipe.device))) for each in states]
            rows.append(torch.stack([network.images(to_uint8(each)).cpu() for each in frames]))  # [S, M, D]
        pictures.append(torch.stack([to_uint8(each) for each in frames], 1))  # [M, S, 3, H, W]
        told(1)
    every = torch.stack(pictures)  # [P, M, S, 3, H, W]
    moving = (every.float() - every[:, :, -1:].float()).abs().mean((0, 1, 3, 4, 5)) / 255
    varied = [pairwise_diversity(torch.stack([row[i] for row in rows])) for i in range(len(times))]
    last, most = len(times) - 1, min(COLUMNS, len(times))
    chosen = sorted({round(i * last / max(1, most - 1)) for i in range(most)})
    return Traced(
        one.name, times, every[:, :, chosen], chosen, moving.tolist(),
        [each.value for each in varied], [each.standard_error for each in varied],
    )  # fmt: skip


def clean_predictions(
    seen: Any, family: Family, shape: tuple[int, ...], rows: int
) -> tuple[list[float], list[Tensor]]:
    """The times of a draw's steps, and the clean states [B, ...] that its network predicts at each.

    Args:
        seen: the draw.
        family: of its pipeline.
        shape: of a state, without B.
        rows: B; a pipeline may hand its scheduler more.

    Raises:
        UserError: for a scheduler whose states are scaled in a way that is not known here.
    """
    scheduler, times, states = seen.scheduler, list[float](), list[Tensor]()
    if type(scheduler).__name__ == "GivenStepsScheduler":
        config, code = scheduler.config, travelling_module("given_steps")
        for i, step in enumerate(seen.steps):
            alpha, sigma = config.alphas[i], config.sigmas[i]
            x0, _ = code.read(step.output.float(), step.sample.float(), alpha, sigma, config.prediction_type)
            times.append(_time(scheduler, step.timestep, sigma))
            states.append(family.unpack(x0, shape)[:rows])
        return times, states
    path, output = path_of(scheduler)
    if isinstance(path, TrigPath) or getattr(scheduler, "init_noise_sigma", 1.0) not in (1, 1.0):
        raise UserError(
            f"trace: the states of a {type(scheduler).__name__} are scaled in a way that is not known here"
        )
    for step, t in zip(seen.steps, times_asked(seen, path), strict=True):
        x, said = (family.unpack(each.float(), shape)[:rows] for each in (step.sample, step.output))
        times.append(t)
        states.append(_read(path, said, output, x, t))
    return times, states


def _read(path: NoisePath, said: Tensor, output: Any, x: Tensor, t: float) -> Tensor:
    return path.read(said, output, x, torch.full((len(x),), t, device=x.device)).x0


def _time(scheduler: Any, timestep: float, sigma: float) -> float:
    """t of a step at given times: of a table its place in it, on a flow path the noise's share."""
    flow = scheduler.config.prediction_type == "flow_prediction"
    return sigma if flow else (timestep + 1) / scheduler.config.num_train_timesteps


def _sheet(found: Sequence[Traced], prompt: str, number: int) -> bytes:
    """PNG of the first seed's predictions: a row for each pipeline, a column for each step."""
    rows = [(f"{each.name}: t = {', '.join(f'{each.times[i]:.2g}' for i in each.shown)}", each.pictures[number, 0])
            for each in found]  # fmt: skip
    return png_of_rows(rows, (), 96)


def _page(found: Sequence[Traced], sheets: Sequence[bytes], prompts: Sequence[str], seeds: int) -> str:
    body = [
        "<h1>What is predicted at each step</h1>",
        "<p>Each row is a pipeline, each cell its clean prediction at one of its steps, from the same noise.</p>",
    ]
    marks = {"x_scale": "linear", "y_scale": "zero"}
    settled = [Series(each.name, list(zip(each.times, each.moving, strict=True))) for each in found]
    varied = [
        Series(
            each.name,
            list(zip(each.times, each.diversity, strict=True)),
            errors=each.error if any(each.error) else (),
        )
        for each in found
    ]
    under = f"t = 1 is noise. {seeds} seeds of {len(prompts)} prompt{'s' * (len(prompts) > 1)}."
    charts: list[str] = [
        _plot(settled, "mean|x0(t) - x0(end)|", "How far the prediction is from the last one", under, marks),
        _plot(
            varied,
            "pairwise diversity of x0(t)",
            "How varied the predictions of one prompt are",
            under,
            marks,
        ),
    ]
    body.append(f"<div class=charts>{''.join(charts)}</div>")
    for prompt, data in zip(prompts, sheets, strict=True):
        sheet = read_sheet(data)
        assert sheet is not None
        body.append(f"<h2>{html.escape(prompt)}</h2>{picture_rows(sheet, name=prompt, width=96)}")
    return document("stepdistill trace", ROWS_STYLE, body)


def _plot(series: Sequence[Series], label: str, title: str, note: str, scales: Mapping[str, Any]) -> str:
    return line_plot(series, "t", label, title=title, note=note, x_range=(0.0, 1.0), **scales)
