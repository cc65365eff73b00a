"""The student's folder and its card, from what a run knows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from stepdistill.data.texts import rows_sha256
from stepdistill.export.adapters import called_with, no_adapter_file
from stepdistill.export.card import LoraFacts, model_card
from stepdistill.export.experts import adapter_files
from stepdistill.export.schedulers import stock_scheduler
from stepdistill.export.shared import terms_of
from stepdistill.export.student_folder import export, pipeline_call
from stepdistill.networks.fingerprint import networks_hash
from stepdistill.system.files import sha256_of
from stepdistill.system.log import utc_now
from stepdistill.training.assemble import Assembled
from stepdistill.training.run_report import Health, Prompts, Start

PICTURES = 4
"""Of the student's own in its folder."""


def started_by(run: Assembled, command: str | None) -> Start:
    """The start of a run by this process."""
    given = command or str(run.origin["command"])
    kept = {name: run.origin[name] for name in ("hardware", "commit")}
    return Start(command=given, at=utc_now(), **kept)


def prompts_of(run: Assembled) -> Prompts | None:
    """What the student learns from; None of a teacher that draws classes."""
    if not run.teacher.family.has_prompts:
        return None
    file = run.recipe.data.prompts
    sha256 = sha256_of(Path(file)) if file else rows_sha256(run.prompts)
    return Prompts(file=file, count=len(run.prompts), sha256=sha256)


def summary_of(run: Assembled) -> str:
    """The first line of its method's file."""
    said = sys.modules[type(run.method).__module__].__doc__ or Path(run.recipe.method).stem
    return said.strip().partition("\n")[0]


def card(run: Assembled, starts: Sequence[Start], scores: str = "", health: Health | None = None) -> str:
    """The student's model card."""
    codec = run.teacher.codec
    pipeline = codec.family.student_pipeline(codec.pipe, run.student.net) or type(codec.pipe).__name__
    alone = run.recipe.export.what == "adapter"
    sampler = called_with(run.sampler, run.student) if alone else run.sampler
    call = pipeline_call(pipeline, sampler, codec, run.shown(1))
    scheduler = stock_scheduler(
        run.sampler, run.student.path, run.teacher.pipe.scheduler, run.teacher.family.passes
    )
    times = ", ".join(f"{time:.4g}" for time in run.sampler.times)
    files = {} if run.recipe.export.what == "merged" else adapter_files(run.student)
    lora = None
    if list(files) == [""] and no_adapter_file(run.teacher, run.student) is None:
        config, module = files[""][0], type(scheduler).__module__
        own = None if module.startswith("diffusers.") else module
        lora = LoraFacts(int(config["r"]), config["lora_alpha"] / config["r"], type(scheduler).__name__, own)
    facts = {}
    if (prompts := prompts_of(run)) is not None:
        learnt = f"`{Path(prompts.file).name}`" if prompts.file else "the teacher's own"
        facts["prompts"] = f"{learnt}, {prompts.count:,}, SHA-256 `{prompts.sha256[:16]}`"
    if (word := run.recipe.data.placeholder_token) is not None:
        facts["new word"] = (
            f"`{word}`, a token of its tokenizer, learnt from {Path(str(run.recipe.data.images)).name}"
        )
    if health is not None:
        facts["health"] = health.line()
    if starts[1:]:
        facts["resumed at update"] = ", ".join(str(each.update) for each in starts[1:])
    return model_card(
        teacher=run.recipe.teacher,
        method=Path(run.recipe.method).stem,
        summary=summary_of(run),
        steps=run.sampler.steps,
        guidance=run.options.guidance,
        call=call,
        grid=f"`{type(scheduler).__name__}`: t = {times}",
        command=starts[0].command,
        changes=run.changes,
        scores=scores,
        terms=terms_of(run.source),
        facts=facts,
        pictures=PICTURES,
        lora=lora,
        alone=alone,
        video=run.teacher.family.video,
    )


def export_student(
    run: Assembled, folder: Path, starts: Sequence[Start], scores: str = "", health: Health | None = None
) -> None:
    """Writes the student folder with the network's present weights."""
    export(
        run.student,
        run.sampler,
        run.teacher,
        folder,
        run.shown(PICTURES),
        card(run, starts, scores, health),
        source=run.source,
        options=run.recipe.export,
        concept=run.method.roles.concept,
    )


def student_hash(run: Assembled) -> str:
    """SHA-256 of the student's present weights, the same however they are exported."""
    return networks_hash([each.net for each in run.student.experts or (run.student,)])
