"""Proof that a student folder draws what it drew in training, with diffusers alone.

The folder's files are hashed and compared with its manifest; then a fresh Python process, in which stepdistill cannot
be imported, loads it with nothing but ``DiffusionPipeline.from_pretrained``, in float32, and draws the manifest's
prompts and seeds. Of an adapter alone it is the teacher's folder that is loaded so, and then its two files. A large one
computes on a GPU, where there is one, and layer by layer, as it may have no room there.
Code that travels in the folder is run only where it is, byte for byte, a file of ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.errors import UserError
from stepdistill.networks.adapter_teacher import place_note, teacher_named
from stepdistill.networks.find import local_folder
from stepdistill.networks.fingerprint import weights_hash
from stepdistill.networks.own_call import IMAGE, VERIFICATION
from stepdistill.networks.pipeline_files import ADAPTER
from stepdistill.system.files import sha256_of
from stepdistill.system.inside import is_inside
from stepdistill.system.parsing import parse_json
from stepdistill.system.travelling import is_own_code, travelling_code

PROGRAM = """
import json, os, sys
sys.modules["stepdistill"] = None  # an import of it raises ImportError
os.environ.update(HF_HUB_OFFLINE="1", DIFFUSERS_VERBOSITY="error", TRANSFORMERS_VERBOSITY="error")
import numpy, torch
from diffusers import DiffusionPipeline
folder, manifest, code = sys.argv[1], json.load(open(sys.argv[2])), sys.argv[3] == "code"
base = sys.argv[4]  # the folder itself, or, where it holds an adapter alone, its teacher's
index = json.load(open(f"{base}/model_index.json"))
absent = {name: None for name, entry in index.items() if entry == [None, None]}  # SD3 without T5, say
if base != folder and "safety_checker" in index:
    absent |= {"safety_checker": None, "requires_safety_checker": False}  # it blackens what it takes for unsafe
pipe = DiffusionPipeline.from_pretrained(
    base, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=code, **absent
)
if base != folder:
    import diffusers, glob
    pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    for file in glob.glob(f"{folder}/scheduler/*.py"):
        sys.path.insert(0, f"{folder}/scheduler")
        diffusers = __import__(os.path.basename(file)[:-3])
    name = json.load(open(f"{folder}/scheduler/scheduler_config.json"))["_class_name"]
    pipe.scheduler = getattr(diffusers, name).from_pretrained(f"{folder}/scheduler")
if getattr(pipe, "watermark", None) is not None:
    pipe.watermark = None  # SDXL adds one where invisible-watermark is installed, whatever the folder says
if type(getattr(pipe, "vae", None)).__name__ == "AutoencoderKLAllegro":
    pipe.vae.enable_tiling()  # it decodes no other way
for name, value in manifest.get("vae", {}).items():
    if isinstance(value, (bool, int, float)):
        setattr(pipe.vae, name, value)  # tiles, which no folder says
pipe.set_progress_bar_config(disable=True)
def draw(call, generators):
    return pipe(**call, generator=generators, output_type="np", return_dict=False)[0]
call = manifest["call"]
from PIL import Image
given = [Image.open(f"{folder}/{name}").convert("RGB") for name in call.get("image", ())]
if given:
    call["image"] = given
def draw_all():
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in manifest["seeds"]]
    if manifest.get("alone"):
        each = [{"prompt": [p], **({"image": given[i]} if given else {})} for i, p in enumerate(call["prompt"])]
        return [draw({**call, **own}, [g])[0] for own, g in zip(each, generators)]
    return draw(call, generators)
networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
size = sum(value.numel() for part in networks for value in part.parameters())
images = None
if size > 4e9 and torch.cuda.is_available():  # a processor would take hours
    torch.backends.cudnn.allow_tf32 = False
    try:
        pipe.enable_sequential_cpu_offload()
        images = draw_all()
    except Exception as error:  # whatever it is, the processor draws what it can
        print("on the processor, as the GPU did not draw:", error, file=sys.stderr)
        pipe.remove_all_hooks()
if images is None:
    images = draw_all()
worst, total = 0.0, 0.0
for i, image in enumerate(images):
    drawn = numpy.rint(numpy.asarray(image, dtype="float64")[..., :3] * 255)
    if drawn.ndim == 4:  # of a video the first, the middle and the last frame are kept
        shown = dict.fromkeys((0, len(drawn) // 2, len(drawn) - 1))
        drawn = numpy.concatenate([drawn[k] for k in shown], axis=1)
    kept = numpy.asarray(Image.open(f"{folder}/verification/{i}.png").convert("RGB"), dtype="float64")
    difference = numpy.abs(drawn - kept)
    worst, total = max(worst, float(difference.max())), total + float(difference.mean()) / len(images)
print("RESULT", json.dumps({"max": worst, "mean": total, "scheduler": type(pipe.scheduler).__name__}))
"""


LONGEST = 6.0
"""Hours that a fresh process may take."""


class NotVerified(UserError):
    """What was to be proved took too long: it may be right."""


def in_a_fresh_process(
    program: str, arguments: list[str], folder: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Runs a program in ``folder`` by an isolated Python: neither environment variables nor the folder are searched."""
    return subprocess.run(
        [sys.executable, "-I", "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=folder,
        check=False,
    )


@dataclass(frozen=True)
class Verification:
    """What a verification found.

    Attributes:
        files: files whose hashes agree.
        images: pictures compared.
        steps: network calls each took.
        scheduler: the class whose grid they were drawn on.
        worst: largest difference of a pixel value, in steps of 1/255.
        mean: mean difference, in the same steps.
    """

    files: int
    images: int
    steps: int
    scheduler: str
    worst: float
    mean: float

    def __str__(self) -> str:
        return (
            f"verified: {self.files} files unaltered; {self.images} pictures drawn in {self.steps} step(s) of "
            f"{self.scheduler} by plain diffusers differ from the trainer's by {self.worst:g}/255 at most, "
            f"{self.mean:.3g}/255 on average"
        )


def student_folder(folder: str | Path) -> Path:
    """The student folder that is meant by itself, or by the run folder it lies in.

    Raises:
        UserError: it is neither.
    """
    folder = Path(folder).resolve()
    if (folder / "student" / VERIFICATION).is_dir():
        folder = folder / "student"
    if not (folder / VERIFICATION / "manifest.json").is_file():
        raise UserError(f"{folder} is not a student folder: it has no {VERIFICATION}/manifest.json")
    return folder


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a student folder's manifest holds.

    Raises:
        UserError: it cannot be read.
    """
    file = folder / VERIFICATION / "manifest.json"
    try:
        manifest: dict[str, Any] = parse_json(file.read_text("utf-8"))
        call, tolerance = manifest["call"], manifest["tolerance"]
        int(call["num_inference_steps"]), float(tolerance["max"]), float(tolerance["mean"])
        [int(seed) for seed in manifest["seeds"]]
        for name in call.get(IMAGE, ()):
            if name not in manifest["files"]:
                raise ValueError(f"call has {name}, which is no file of the folder")
        for name, sha256 in manifest["files"].items():
            if not isinstance(sha256, str) or not is_inside(name):
                raise ValueError(f"files has {name}, which is no file of the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{file} cannot be read ({error}): export the student again") from error
    return manifest


def check_unaltered(folder: Path) -> dict[str, Any]:
    """The manifest of a student folder, every file of which has the SHA-256 that it had at export.

    Raises:
        UserError: the manifest cannot be read, or a file is missing or altered.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing since export")
        if sha256_of(folder / name) != expected:
            raise UserError(f"{folder}: {name} was altered since export (its SHA-256 is not the manifest's)")
    return manifest


def verify(folder: str | Path, hours: float | None = None) -> Verification:
    """Checks a student folder.

    Args:
        folder: what ``train`` or ``export`` wrote as ``student/``, or the run folder it lies in.
        hours: that the fresh process may take; None is LONGEST.

    Raises:
        NotVerified: it took longer.
        UserError: when the folder is no student, a file is missing or altered, it carries foreign code, it does not
            load, or its pictures differ.
    """
    folder = student_folder(folder)
    manifest = check_unaltered(folder)
    file = folder / VERIFICATION / "manifest.json"
    code = travelling_code(folder)
    for path in code:
        if not is_own_code(path):
            raise UserError(
                f"{folder} carries {path.relative_to(folder).as_posix()}, which is not a file this stepdistill ships, "
                "so it was not run: verify it with the version that wrote it, or read it and load the folder yourself"
            )
    arguments = [str(folder), str(file), "code" if code else "stock", str(_base(folder))]
    hours = LONGEST if hours is None else hours
    try:
        done = in_a_fresh_process(PROGRAM, arguments, folder, 3600 * hours)
    except subprocess.TimeoutExpired:
        raise NotVerified(
            f"{folder}: plain diffusers had not drawn its pictures again after {hours:g} hours: give it more by "
            "`stepdistill verify STUDENT --hours N`, or verify it where there is a GPU"
        ) from None
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if done.returncode or line is None:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{folder} does not draw in a process without stepdistill: {reason}")
    result, tolerance, seeds = (
        json.loads(line.removeprefix("RESULT ")),
        manifest["tolerance"],
        manifest["seeds"],
    )
    if result["max"] > tolerance["max"] or result["mean"] > tolerance["mean"]:
        raise UserError(
            f"{folder}: its pictures differ from the trainer's by {result['max']:g}/255 at most and "
            f"{result['mean']:.3g}/255 on average; allowed are {tolerance['max']} and {tolerance['mean']}"
        )
    steps: int = manifest["call"]["num_inference_steps"]
    return Verification(
        len(manifest["files"]), len(seeds), steps, result["scheduler"], result["max"], result["mean"]
    )


def _base(folder: Path) -> Path:
    """The folder whose pipeline draws: the student's own, or the teacher's where it is an adapter alone.

    Raises:
        UserError: the teacher is not there, or is another one than it was.
    """
    if not (folder / ADAPTER).is_file():
        return folder
    teacher, sha256 = teacher_named(folder)
    found = local_folder(teacher)
    if found is None:
        raise UserError(
            f"{folder} is an adapter for {teacher}, which is not there: download it, or write its folder's path into "
            f"{place_note(sha256)}"
        )
    if weights_hash(found) != sha256:
        raise UserError(f"{folder} is an adapter for {teacher}, which was altered since export")
    return found
