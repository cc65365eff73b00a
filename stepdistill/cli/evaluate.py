"""``stepdistill eval`` and ``stats``: a pipeline or images measured; a reference made of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stepdistill.cli.options import MeasuredGuidance
from stepdistill.errors import UserError
from stepdistill.networks.find import check_no_runs, find_pipeline

if TYPE_CHECKING:
    from stepdistill.evaluation.suite import Suite


Precision = Literal["float32", "bf16"]
DEFAULT_SUITE, BY_TEACHER, DEFAULT_BATCH = "emoji", "teacher", 100
WORKERS = "Processes that decode images; 0 leaves it to threads. Default: by their number and the cores."


def evaluate_pipeline(
    pipeline: Annotated[
        str,
        typer.Argument(
            help="Embedded teacher, diffusers folder, run folder (its student); or images: a folder, zip, npz or tar."
        ),
    ],
    suite: Annotated[
        str | None,
        typer.Option(
            help="Evaluation suite: a shipped name, a .yaml file, or teacher: a run's student against its teacher's "
            "pictures. [default: emoji; teacher for a run whose teacher is not embedded]"
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            help="Step counts, separated by commas. [default: a student's own; of a teacher the suite's, 25 of most]"
        ),
    ] = None,
    guidance: MeasuredGuidance = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures drawn at once. [default: 100]")] = None,
    trailing: Annotated[
        bool, typer.Option("--trailing", help="Space the teacher's steps from its end.")
    ] = False,
    diversity: Annotated[
        int, typer.Option(help="Also draw so many samples of each of 100 prompts: how much they differ.")
    ] = 0,
    reference: Annotated[
        Path | None, typer.Option(help="Reference statistics in place of the suite's, as `stats` makes them.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts in place of the suite's: .txt, .jsonl, .json, .csv, .tsv or .tar."),
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="Number of images in place of the suite's, for a try.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for report.json, .md and .html; the same command goes on where it was stopped. "
            "Or a .json file for the report alone."
        ),
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help="Of the feature networks in place of the suite's; bf16 is a protocol of its own."),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=0, help=WORKERS)] = None,
) -> None:
    """Measure a pipeline, or images: Frechet distance, KID, CLIP score, precision and recall, density and coverage."""
    from stepdistill.system.processes import launched

    processes = launched()
    if (run := _measured_by_teacher(pipeline, suite)) is not None:
        given = {"--guidance": guidance, "--trailing": trailing or None, "--diversity": diversity or None,
                 "--reference": reference, "--prompts": prompts, "--precision": precision, "--batch": batch,
                 "--workers": workers}  # fmt: skip
        if foreign := [name for name, value in given.items() if value is not None]:
            raise UserError(
                f"{foreign[0]} is of suites, and {run} is measured against its teacher's pictures: give --suite"
            )
        if processes.main:
            _against_teacher(run, steps, n, output)
        return

    def check() -> tuple[tuple[int, ...] | None, Path | None, Suite]:
        counts = None if steps is None else _step_counts(steps)
        folder = pipeline_or_images(pipeline)
        if folder is not None and not trailing:
            _check_student(folder, counts, guidance)
        if folder is None and (counts is not None or guidance is not None or trailing or diversity):
            raise UserError(
                f"{pipeline} holds images: --steps, --guidance, --trailing and --diversity are of pipelines"
            )
        if folder is not None and workers is not None:
            raise UserError(f"{pipeline} is a pipeline, which draws: --workers decode images that are there")
        if output is not None:
            _check_output(output)
        from stepdistill.evaluation.suite import load_suite

        protocol = load_suite(suite or DEFAULT_SUITE)
        if reference is not None:
            from stepdistill.evaluation.reference import for_reference

            protocol = for_reference(protocol, reference)
        protocol = protocol.derive(n=n, prompts=prompts, precision=precision)
        if diversity:
            protocol = protocol.with_diversity(diversity)
        return counts, folder, protocol

    counts, folder, protocol = processes.together(check)
    at_once = batch or DEFAULT_BATCH
    place = None if output is None or _is_report(output) else output
    if folder is None:
        if not processes.main:  # reading images is the work of one
            return
        from stepdistill.evaluation.given_images import evaluate_images

        report = evaluate_images(pipeline, protocol, batch=at_once, output=place, workers=workers)
    else:
        from stepdistill.evaluation.evaluate import evaluate

        report = evaluate(
            folder,
            suite=protocol,
            steps=counts,
            guidance=guidance,
            batch=at_once,
            trailing=trailing,
            output=place,
            processes=processes,
        )
        processes.part()
    if not processes.main:
        return
    print(report.markdown())
    if output is not None and place is None:
        report.save(output)
    if output is not None:
        print(output)


def stats(
    images: Annotated[str, typer.Argument(help="Real images: a folder, zip, npz or tar.")],
    output: Annotated[Path, typer.Option(help="Statistics file to write (.safetensors).")],
    features: Annotated[
        str,
        typer.Option(
            help="emoji, judge, inception, inception:FILE, clip:FOLDER, dinov2:FOLDER or module:NAME of your own."
        ),
    ] = "emoji",
    resize: Annotated[
        str, typer.Option(help="How images reach the network: clean, tf1 or pytorch.")
    ] = "clean",
    resolution: Annotated[
        int, typer.Option(min=0, help="Bring the images to this size first; 0 leaves each at its own.")
    ] = 0,
    moments_only: Annotated[
        bool, typer.Option("--moments-only", help="Leave out what KID, precision and recall need.")
    ] = False,
    spatial: Annotated[
        bool, typer.Option("--spatial", help="Also what sFID needs; inception from a state dict has it.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 256,
    precision: Annotated[
        Precision, typer.Option(help="Of the network; bf16 serves suites of bf16 alone.")
    ] = "float32",
    workers: Annotated[int | None, typer.Option(min=0, help=WORKERS)] = None,
) -> None:
    """Make reference statistics of real images, with their protocol inside."""
    from stepdistill.system.files import check_file

    check_file(output)
    from stepdistill.data.image_archives import open_images

    source = open_images(images, resolution=resolution, workers=workers)
    from stepdistill.evaluation.statistics import make_statistics
    from stepdistill.features.load import network_of

    network = network_of(features, resize, precision=precision)
    made = make_statistics(
        source,
        network,
        output,
        resolution=resolution,
        keep_features=not moments_only,
        spatial=spatial,
        batch=batch,
    )
    print(f"{output}: {made['n']} images, {made['features']}, {made['resize']}")


def _is_report(output: Path) -> bool:
    return output.suffix == ".json" and not output.is_dir()


def _check_output(output: Path) -> None:
    from stepdistill.system.files import check_file, check_folder

    if _is_report(output):
        check_file(output)
    elif output.is_file():
        raise UserError(f"--output {output} is a file: give a folder, or a file whose name ends with .json")
    else:
        check_folder(output)


def _measured_by_teacher(pipeline: str, suite: str | None) -> Path | None:
    """The run whose student is to be measured against its teacher's pictures, None where it is by a suite."""
    from stepdistill.system.emoji import embedded_teachers
    from stepdistill.system.run_folder import RunFolder

    place = Path(pipeline).expanduser()
    run = RunFolder(place.parent if place.name == "student" else place)
    known = run.recipe.is_file() and run.report.is_file()
    if suite not in (None, BY_TEACHER):
        return None
    if suite is None and known:
        from stepdistill.training.run_report import read_report

        return None if read_report(run.root).teacher_name in embedded_teachers() else run.root
    if suite == BY_TEACHER and not known:
        raise UserError(f"--suite {BY_TEACHER}: {pipeline} is no finished run, so its teacher is not known")
    return run.root if suite == BY_TEACHER else None


def _against_teacher(run: Path, steps: str | None, n: int | None, output: Path | None) -> None:
    if output is not None:
        _check_output(output)
        if _is_report(output):
            raise UserError(f"--output {output}: give a folder; report.json goes there")
    counts = () if steps is None else _step_counts(steps)
    from stepdistill.training.measure_again import measure_again
    from stepdistill.training.report import score_table

    print(score_table(measure_again(run, counts, n, output)))
    print(output or run)


def _check_student(folder: Path, counts: tuple[int, ...] | None, guidance: float | None) -> None:
    """A student was trained for the step counts; a scale that it does not want is told."""
    from stepdistill.networks.own_call import own_call, steps_of
    from stepdistill.system.log import say
    from stepdistill.system.processes import told

    own = own_call(folder)
    for count in counts or ():
        steps_of(own, count)
    if own is not None and told().main and (warning := own.warning(guidance)) is not None:
        say(warning)


def _step_counts(text: str) -> tuple[int, ...]:
    counts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in counts):
        raise UserError(f"--steps {text}: give step counts separated by commas, such as 1,2,4")
    return tuple(int(part) for part in counts)


def pipeline_or_images(name: str | Path) -> Path | None:
    """The folder of a pipeline, or None where the name is of images.

    Raises:
        UserError: it is of neither, or of a run that has no student yet.
    """
    try:
        return find_pipeline(name)
    except UserError:
        from stepdistill.data.image_archives import is_source

        if not is_source(name):
            raise
        place = Path(name).expanduser()
        if place.is_dir():
            check_no_runs(place)
            _check_images(place)
        return None


def _check_images(folder: Path) -> None:
    """A folder that is no pipeline holds images."""
    import os

    from stepdistill.data.image_names import is_image

    for _, _, files in os.walk(folder):
        if any(map(is_image, files)):
            return
    raise UserError(
        f"{folder} is neither a pipeline (it has no model_index.json) nor a run, and holds no images: give one of these"
    )
