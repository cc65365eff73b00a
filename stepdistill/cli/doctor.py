"""``stepdistill doctor``: is this installation able to run, is this teacher understood, how is this run? What is broken
is said with what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepdistill.cli.findings import Finding, State, print_findings
from stepdistill.cli.options import sides_of
from stepdistill.errors import UserError

if TYPE_CHECKING:
    import torch
    from packaging.requirements import Requirement

    from stepdistill.networks.denoiser import Denoiser
    from stepdistill.networks.sampler import Sampler

LEAST_FREE_GB = 5


def examine() -> list[Finding]:
    """Looks at Python, versions, torch, devices, attention kernels, compiler, torchvision, cache and disk."""
    findings = [Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}")]
    findings += _versions()
    findings += _torch()
    findings.append(_torchvision())
    findings += _cache()
    return findings


def requirements() -> list[Requirement]:
    """What the installed package says it needs; empty where it is imported from a folder without installation."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("stepdistill") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Requirement(line) for line in lines]


def check_requirement(requirement: Requirement, installed: str | None) -> Finding:
    """Whether an installed version (None: not installed) satisfies a requirement."""
    wanted = f"{requirement.name}{requirement.specifier}"
    if installed is None:
        return Finding("broken", requirement.name, f"not installed, and needed: pip install '{wanted}'")
    if not requirement.specifier.contains(installed, prereleases=True):
        text = f"{installed} is outside the supported range: pip install '{wanted}'"
        return Finding("broken", requirement.name, text)
    return Finding("ok", requirement.name, installed)


def _versions() -> list[Finding]:
    found = requirements()
    if not found:
        text = "is not installed, only found on the path: versions are not checked (pip install -e .)"
        return [Finding("note", "stepdistill", text)]
    findings = [Finding("ok", "stepdistill", importlib.metadata.version("stepdistill"))]
    unique: dict[str, Requirement] = {}
    for requirement in found:
        unique.setdefault(requirement.name, requirement)  # an extra may list again what another has
    for requirement in unique.values():
        # Extras are optional, but one that is there must fit.
        optional = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        installed = _installed(requirement.name)
        if not optional or (installed is not None and requirement.name in ("xformers", "torchmetrics")):
            findings.append(check_requirement(requirement, installed))
    return findings


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> list[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Finding("broken", "torch", f"cannot be imported: {_line(error)}")]
    findings = []
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        text = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, bf16 {torch.cuda.is_bf16_supported()}"
        findings.append(Finding("ok", f"cuda:{i}", text))
    if not findings:
        built = (
            f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        )
        findings.append(
            Finding("note", "cuda", f"no GPU ({built}); training runs on {os.cpu_count()} CPU cores")
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [*findings, *_attention(device), _compile(device)]


def _compile(device: torch.device) -> Finding:
    """Which values of ``train.compile`` run here."""
    from stepdistill.networks.compiled import KINDS, why_not_compiled

    reasons = {kind: why_not_compiled(kind, device) for kind in KINDS if kind != "none"}
    able = ", ".join(kind for kind, reason in reasons.items() if reason is None)
    if able:
        return Finding("ok", "compile", f"{able} on {device.type}")
    return Finding("note", "compile", f"cannot be chosen: {next(iter(reasons.values()))}")


def _attention(device: torch.device) -> list[Finding]:
    """Which of torch's fused kernels run here, found by running each; our own, xformers, and the dispatcher's."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from stepdistill.attention import dispatcher
    from stepdistill.attention.kernels import NAMES, why_not

    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query = torch.zeros(1, 2, 16, 32, device=device, dtype=dtype)
    able = []
    for name, kernel in kernels.items():
        try:
            with sdpa_kernel(kernel):
                torch.nn.functional.scaled_dot_product_attention(query, query, query)
        except RuntimeError:
            continue
        able.append(name)
    findings = [Finding("ok", "attention sdpa", f"{', '.join(able)} on {device.type} in {str(dtype)[6:]}")]
    for name in NAMES:
        if (reason := why_not(name, device)) is not None:
            findings.append(Finding("note", f"attention {name}", f"cannot be chosen: {reason}"))
        elif name in ("triton", "xformers"):
            findings.append(Finding("ok", f"attention {name}", f"{_installed(name)} on {device.type}"))
    precision = "bf16" if device.type == "cuda" else "float32"
    groups: dict[str | None, list[str]] = {None: []}  # by the reason why not
    for name in dispatcher.names():
        if name not in NAMES:
            groups.setdefault(why_not(name, device, precision), []).append(name)
    subject = "attention diffusers"
    findings.append(Finding("ok", subject, f"{', '.join(groups.pop(None))}: of networks that dispatch"))
    for why, names in groups.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        findings.append(Finding("note", subject, f"{', '.join(names[:3])}{more}: {why}"))
    return findings


def _torchvision() -> Finding:
    """A torchvision built for another torch breaks pipelines that only look whether it is there."""
    version = _installed("torchvision")
    if version is None:
        return Finding("ok", "torchvision", "not installed, and not needed without the extra eval")
    try:
        import torch
        import torchvision  # type: ignore[import-untyped,unused-ignore]

        torch.ops.torchvision.nms  # noqa: B018 - the operator is registered only by a matching build
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        text = (
            f"{version} does not match torch {_installed('torch')} ({_line(error)}): diffusers and transformers fail "
            "with it; install both from one index, or pip uninstall torchvision"
        )
        return Finding("broken", "torchvision", text)
    return Finding("ok", "torchvision", f"{torchvision.__version__}, matches torch")


def _cache() -> list[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    findings = []
    for subject, folder in (
        ("model cache", Path(HF_HUB_CACHE)),
        ("temporary files", Path(tempfile.gettempdir())),
    ):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            findings.append(Finding("broken", subject, f"{folder} cannot be written: {error.strerror}"))
        else:
            findings.append(Finding("ok", subject, str(folder)))
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    state: State = "ok" if free >= LEAST_FREE_GB else "note"
    findings.append(Finding(state, "disk", f"{free:.0f} GiB free in {Path.cwd()}"))
    if sys.platform == "linux" and (threads := os.environ.get("OMP_NUM_THREADS")):
        findings.append(
            Finding("note", "threads", f"OMP_NUM_THREADS={threads}: torch uses no more CPU cores")
        )
    return findings


def examine_teacher(source: str, size: str | None = None, family: str | None = None) -> list[Finding]:
    """Compares the teacher's own picture with ours, and the grids of students with what their pipelines ask.

    Args:
        source: an embedded teacher, a diffusers folder or a Hub name.
        size: what is drawn: "512x512" or "480x832x81", also with commas; None is the pipeline's own.
        family: a file of one's own.
    """
    import torch

    from stepdistill.export.checks import grid_check, silent_draw, teacher_check
    from stepdistill.export.student_folder import pipeline_call, student_pipeline
    from stepdistill.families import family_in
    from stepdistill.families.size import Size
    from stepdistill.networks.distilled import why_guided_already
    from stepdistill.networks.loading import load_teacher
    from stepdistill.networks.student import Student
    from stepdistill.networks.teacher import PipelineTeacher

    device = "cuda" if torch.cuda.is_available() else "cpu"
    findings: list[Finding] = []
    try:
        drawn_at = Size(*sides_of(size)) if size is not None else None
        own = family_in(family) if family else None
        pipe = load_teacher(source, family=own)
        teacher = PipelineTeacher(pipe, device, own, size=drawn_at)
        findings.append(Finding("ok", "family", teacher.family.remark or teacher.family.name))
        if why := why_guided_already(teacher, source):
            text = f"in the teacher's weights already: {why}; set options.guidance=1"
            findings.append(Finding("note", "guidance", text))
        prompt = "a photograph of a cat" if teacher.family.has_prompts else "0"
        apart = teacher_check(teacher, prompt, 4)
    except UserError as error:
        return [*findings, Finding("broken", "teacher", str(error))]
    said = "its scheduler takes learned variances" if apart is None else f"{apart:.0e} apart in 4 steps"
    findings.append(Finding("ok" if apart is not None else "note", "teacher check", said))
    net = teacher.denoiser
    student = Student(net.net, net.path, net.output, net.family, net.shape)
    for steps in (1, 2, 4, 8):
        try:
            sampler = _grid_of(net, pipe.scheduler, steps)
            drawn = student_pipeline(student, sampler, teacher)
            call = pipeline_call(type(drawn).__name__, sampler, teacher.codec, [prompt])
            grid_check(silent_draw(drawn, net.family.network, call), sampler, net.path)
            times = ", ".join(f"{t:.4g}" for t in sampler.times)
            text = f"{steps} step{'s' * (steps > 1)}: {type(drawn.scheduler).__name__} asks for {times}"
            findings.append(Finding("ok", "grid check", text))
        except UserError as error:
            findings.append(Finding("note", "grid check", f"{steps} steps: {error}"))
    return findings


def _grid_of(net: Denoiser, scheduler: Any, steps: int) -> Sampler:
    """Even times, or those of its pipeline's own grid, where that draws so many steps at others alone.

    Raises:
        UserError: no scheduler has either.
    """
    from stepdistill.diffusion.path import TrigPath
    from stepdistill.export.schedulers import on_stock_grid
    from stepdistill.networks.sampler import Sampler, schedule_times

    passes, fresh = net.family.passes, isinstance(net.path, TrigPath)
    try:
        even = Sampler(schedule_times(net.path, steps), renoise=fresh)
        return on_stock_grid(even, net.path, scheduler, passes=passes)
    except UserError:
        if not fresh:
            raise
        one = Sampler(schedule_times(net.path, 1), renoise=True)
        return on_stock_grid(one, net.path, scheduler, steps, passes)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]


def doctor(
    run: Annotated[
        Path | None, typer.Argument(help="Look at this run: finished, under way, stopped or killed.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Check this teacher: embedded, diffusers folder or Hub name.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="What it draws: 512x512, or of a video 480x832x81.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="A family of your own, ./file.py.")] = None,
) -> None:
    """Check the installation (versions, devices, attention kernels, compiler, cache, disk), a teacher, or a run."""
    if run is not None:
        if teacher is not None or size is not None or family is not None:
            raise UserError("doctor looks at a run, or with --teacher at a teacher: give one of them")
        from stepdistill.cli.doctor_run import examine_run

        print_findings(examine_run(run))
        return
    if teacher is None and (size is not None or family is not None):
        raise UserError(
            f"--{'family' if size is None else 'size'} is the teacher's: add --teacher, or leave it out"
        )
    findings = examine() if teacher is None else examine_teacher(teacher, size, family)
    print_findings(findings)
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)
