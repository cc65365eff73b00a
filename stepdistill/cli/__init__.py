"""The command line. torch and diffusers are imported inside a verb, after everything cheap was checked."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from stepdistill.cli.evaluate import evaluate_pipeline
from stepdistill.errors import OtherProcessError, UserError

app = typer.Typer(
    name="stepdistill",
    help="Distil diffusion and flow pipelines into students that draw in one to eight steps.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Kind = Literal["all", "teachers", "methods", "recipes", "suites", "families"]
Pipeline = Annotated[
    str, typer.Argument(help="Embedded teacher, diffusers folder or run folder (its student).")
]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 is none.")]


def main() -> None:
    """Runs the command line: a UserError is one line on stderr and exit status 2, anything else keeps its traceback."""
    try:
        app()
    except OtherProcessError:
        time.sleep(10)  # a launcher ends all processes when one ends, and that other one has yet to say why
        raise SystemExit(2) from None
    except UserError as error:
        print(f"stepdistill: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from stepdistill import __version__

        print(__version__)
        raise typer.Exit


@app.command("ls")
def list_names(kind: Annotated[Kind, typer.Argument(help="What to list.")] = "all") -> None:
    """List what is shipped: teachers, methods, recipes, suites, families."""
    from stepdistill.networks.pipeline_files import pipeline_class
    from stepdistill.system import shipped as content
    from stepdistill.system.emoji import embedded_teachers

    tables: dict[str, dict[str, str]] = {}
    if kind in ("all", "teachers"):
        shipped = embedded_teachers()
        tables["teachers"] = {name: pipeline_class(path) for name, path in shipped.items()}
    if kind in ("all", "methods"):
        tables["methods"] = content.module_summaries("methods")
    if kind == "methods":  # what a method needs is in its class, so that this alone imports torch
        from stepdistill.methods import needs

        told = {name: needs(name) for name in tables["methods"]}
        width = max(map(len, told.values()))
        tables["methods"] = {
            name: f"{told[name].ljust(width)}  {text}" for name, text in tables["methods"].items()
        }
    if kind in ("all", "recipes"):
        tables["recipes"] = {name: content.header(path) for name, path in content.recipe_files().items()}
    if kind in ("all", "suites"):
        tables["suites"] = {name: content.header(path) for name, path in content.suite_files().items()}
    if kind in ("all", "families"):
        tables["families"] = content.module_summaries("families")
    for title, table in tables.items():
        if kind == "all":
            print(f"{title}:")
        width = max(map(len, table), default=0)
        for name, summary in table.items():
            print(f"  {name.ljust(width)}  {summary}".rstrip())


@app.command("cp")
def copy_recipe(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    dest: Annotated[Path, typer.Argument(help="File or folder to copy it to.")],
) -> None:
    """Copy a shipped recipe, to edit it."""
    from stepdistill.errors import did_you_mean
    from stepdistill.system.shipped import recipe_files

    shipped = recipe_files()
    name = recipe.removesuffix(".yaml")
    if name not in shipped:
        raise UserError(f"{recipe} is not a shipped recipe {did_you_mean(name, shipped)}")
    target = dest / f"{name}.yaml" if dest.is_dir() else dest
    if target.exists():
        raise UserError(f"{target} exists already: give another name")
    try:
        target.write_bytes(shipped[name].read_bytes())
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    print(target)


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="Shipped recipe, or a .yaml file.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Embedded teacher, diffusers folder or Hub name.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="A method's name, or ./file.py.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Run folder; by default runs/METHOD_TEACHER, numbered.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Set one key of the recipe; may repeat."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
) -> None:
    """Train a student, export it, prove the export and measure it."""
    from stepdistill.methods import method_options
    from stepdistill.recipes.recipe import load_recipe
    from stepdistill.training import preflight as checks

    source: str | Path | None = recipe
    if resume and recipe is None and output is not None and (output / "recipe.yaml").is_file():
        source = output / "recipe.yaml"  # the run's own recipe, so that --resume --output RUN is enough
    wanted = load_recipe(source, teacher=teacher, method=method, sets=sets or ())
    first_process = os.environ.get("RANK", "0") == "0"
    given = output or (Path(wanted.output) if wanted.output else None)
    folder = given or _default_run_folder(wanted.method, wanted.teacher, resume)
    if first_process:
        checks.check_output(folder, resume=resume)
    checks.check_recipe(wanted, folder if resume else None)
    method_options(wanted)

    from stepdistill.training.distil import distil

    run = distil(wanted, output=folder, resume=resume, command=_command())
    if first_process:
        print(f"student: {run.student}")
        print(f"picture: {folder / 'samples.png'}")
        if run.report.get("gap_closed"):
            from stepdistill.comparison.ranking import rank, text_table

            print(text_table(rank([{"name": folder.name, "method": wanted.method} | run.report])))


@app.command()
def sample(
    student: Pipeline,
    prompt: Annotated[list[str], typer.Option(help="Text of one picture; may repeat.")],
    steps: Annotated[int, typer.Option(help="Network evaluations per picture.")] = 1,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(help="Picture i is drawn from seed + i.")] = 0,
    output: Annotated[Path, typer.Option(help="Picture file to write.")] = Path("grid.png"),
) -> None:
    """Draw pictures from prompts, on one grid."""
    from stepdistill.system.files import check_file

    check_file(output)
    from stepdistill.evaluation.sample import sample as draw
    from stepdistill.pages.sheets import grid

    grid(draw(student, prompt, steps=steps, guidance=guidance, seed=seed)).save(output)
    print(output)


app.command("eval")(evaluate_pipeline)


@app.command()
def geneval(
    pipeline: Pipeline,
    prompts: Annotated[
        Path, typer.Option(help="GenEval's evaluation_metadata.jsonl; also GenEval 2's file.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write to; a begun one is finished.")],
    steps: Annotated[int, typer.Option(min=1, help="Network evaluations per picture.")] = 4,
    samples: Annotated[int, typer.Option(min=1, max=10_000, help="Pictures of each prompt.")] = 4,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(min=0, help="Picture j of prompt i: seed + samples * i + j.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 8,
    trailing: Annotated[
        bool, typer.Option("--trailing", help="Space the teacher's steps from its end.")
    ] = False,
) -> None:
    """Draw GenEval's prompts into its folder format, which its own environment then scores."""
    from stepdistill.evaluation.geneval import check_export, export_geneval, read_metadata
    from stepdistill.networks.find import find_pipeline

    find_pipeline(pipeline)
    read_metadata(prompts)
    check_export(output)
    drawn = export_geneval(
        pipeline, prompts, output, steps=steps, samples=samples, guidance=guidance, seed=seed, batch=batch,
        trailing=trailing,
    )  # fmt: skip
    print(f"{output}: {drawn} pictures drawn")


@app.command()
def stats(
    images: Annotated[str, typer.Argument(help="Real images: a folder, zip, npz or tar.")],
    output: Annotated[Path, typer.Option(help="Statistics file to write (.safetensors).")],
    features: Annotated[
        str, typer.Option(help="emoji, inception, inception:FILE, clip:FOLDER or dinov2:FOLDER.")
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
) -> None:
    """Make reference statistics of real images, with their protocol inside."""
    from stepdistill.system.files import check_file

    check_file(output)
    from stepdistill.data.image_sources import open_images

    source = open_images(images, resolution=resolution)
    from stepdistill.evaluation.statistics import make_statistics
    from stepdistill.features.load import network_of

    network = network_of(features, resize)
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


@app.command()
def compare(
    reports: Annotated[
        list[str] | None,
        typer.Argument(help="Run folders, folders or files of `eval --output`; or none, and --methods."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Train first: all, or methods, shipped recipes and recipe files, separated by commas."
        ),
    ] = None,
    teacher: Annotated[str, typer.Option(help="Teacher of the runs that are trained.")] = "emoji",
    budget: Annotated[
        str | None,
        typer.Option(help="Training time of each run, such as 90s, 10m or 1h; by default no limit."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Set one key of every recipe; may repeat."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for compare.html, compare.json and the runs; trained: runs/compare_TEACHER."
        ),
    ] = None,
) -> None:
    """Put runs and evaluations side by side, ranked, or one run for each of several methods, trained first.

    The same command goes on where it was stopped: finished runs are kept, unfinished ones resumed, failed ones tried
    again.
    """
    if bool(reports) == bool(methods):
        raise UserError("compare: give either run folders, or --methods (all, or names separated by commas)")
    if reports and (budget or sets or teacher != "emoji"):
        raise UserError("compare: --budget, --set and --teacher are of runs that are trained: add --methods")
    folder = output
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; give a folder")
    from stepdistill.comparison import train_all as side_by_side
    from stepdistill.system.files import check_writable

    if methods:
        wanted = side_by_side.plan(
            methods, teacher, side_by_side.seconds_of(budget) if budget else 0.0, sets or ()
        )
        folder = output or Path("runs") / f"compare_{Path(teacher).name}"
        check_writable(folder)
        compared = side_by_side.compare_methods(wanted, folder, _command())
    else:
        compared = side_by_side.collect(reports or [], _command())
    from stepdistill.comparison.ranking import rank, text_table

    print(text_table(rank(compared.reports)))
    for name, error in compared.failed.items():
        print(f"{name}: failed: {error}")
    if compared.without_recipe:
        print(f"no recipe for: {', '.join(compared.without_recipe)}")
    if folder is not None:
        print(side_by_side.write_all(compared, folder))
    if compared.failed and not compared.reports:
        raise typer.Exit(1)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder, finished or interrupted.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for the student; by default RUN/student.")
    ] = None,
) -> None:
    """Export the student of a run's last checkpoint again."""
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is not a run folder: it has no recipe.yaml")
    from stepdistill.training.distil import export_run

    print(export_run(run, output))


@app.command()
def verify(student: Annotated[Path, typer.Argument(help="Student folder.")]) -> None:
    """Prove that plain diffusers loads a student and draws what its trainer drew."""
    if not student.is_dir():
        raise UserError(f"{student} is not a folder; give a student's folder, such as runs/NAME/student")
    from stepdistill.export.verify import verify as prove

    print(prove(student))


@app.command()
def doctor() -> None:
    """Check the installation: versions, devices, attention kernels, cache and disk."""
    from stepdistill.cli.doctor import examine

    findings = examine()
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        print(f"{finding.state.ljust(6)}  {finding.subject.ljust(width)}  {finding.text}")
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)


def _default_run_folder(method: str, teacher: str, resume: bool) -> Path:
    from stepdistill.training import preflight as checks

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Each process would number the folder by what it finds, and the first one has made its own by then.
        raise UserError("give --output DIR when several processes train together")
    name = f"{Path(method).stem}_{Path(teacher).name}"
    return (checks.newest_run_folder if resume else checks.next_run_folder)(Path("runs"), name)


def _command() -> str:
    """The command as the user gave it, for the report."""
    return shlex.join(["stepdistill", *sys.argv[1:]])
