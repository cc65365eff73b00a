"""How a student is called: what its folder's proof was drawn with, and its teacher beside it. Imports no torch.

Pictures that a call draws from lie beside the proof's own, and stand in its manifest by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.errors import UserError
from stepdistill.pictures.given import with_picture
from stepdistill.system.parsing import parse_json
from stepdistill.system.parsing_yaml import parse_yaml
from stepdistill.system.run_folder import RunFolder

VERIFICATION = "verification"
"""The folder of a student's proof; its manifest.json says with which call the pictures beside it were drawn."""
TEACHER_STEPS = 25
"""Steps of a pipeline that is no student, where nobody says otherwise."""
_GUIDANCE = "guidance_scale"
IMAGE = "image"
"""What calls name the picture that they draw from."""
_GIVEN_ANEW = frozenset({"prompt", IMAGE, "class_labels", "batch_size", "num_inference_steps", _GUIDANCE})


@dataclass(frozen=True)
class OwnCall:
    """A student's own call.

    Attributes:
        steps: network calls a picture takes.
        counts: step counts that it was trained for, ascending, and any between them; None: not known.
        guidance: the ``guidance_scale`` of its call; None where the call takes none.
        arguments: the call's further arguments, such as height, width and eta.
        alone: whether it draws one prompt at a time.
        from_picture: whether it draws from a picture.
    """

    steps: int
    counts: tuple[int, ...] | None
    guidance: float | None
    arguments: Mapping[str, Any]
    alone: bool = False
    from_picture: bool = False

    @property
    def input_guidance(self) -> float | None:
        """The scale that a student takes as an input; None where guidance is in its weights."""
        return self.guidance if self.guidance is not None and self.guidance > 1 else None

    def check_steps(self, steps: int) -> None:
        """Refuses a step count that the student was not trained for.

        Raises:
            UserError: it was not.
        """
        if self.counts is not None and not self.counts[0] <= steps <= self.counts[-1]:
            able = " to ".join(map(str, dict.fromkeys((self.counts[0], self.counts[-1]))))
            raise UserError(
                f"--steps is {steps}, but this student draws in {able} step{'s' * (self.counts[-1] > 1)}: leave "
                f"--steps out, or train one with student.steps={steps}"
            )

    def warning(self, guidance: float | None) -> str | None:
        """What is to be said of a guidance scale; None where there is nothing."""
        if guidance is None or guidance <= 1 or self.input_guidance is not None:
            return None
        return (
            f"--guidance {guidance:g}: guidance is in this student's weights, and guiding it again spoils its "
            "pictures; leave --guidance out"
        )


def steps_of(own: OwnCall | None, wanted: int | None) -> int:
    """The step count to draw with: what is wanted, or the student's own, or TEACHER_STEPS.

    Raises:
        UserError: less than 1, or none that the student was trained for.
    """
    if wanted is None:
        return TEACHER_STEPS if own is None else own.steps
    if wanted < 1:
        raise UserError(f"--steps is {wanted}, and must be 1 or more")
    if own is not None:
        own.check_steps(wanted)
    return wanted


def own_call(folder: Path) -> OwnCall | None:
    """The own call of the student in a folder; None of a pipeline that is no student.

    Raises:
        UserError: its manifest is damaged.
    """
    file = folder / VERIFICATION / "manifest.json"
    if not file.is_file():
        return None
    try:
        manifest = parse_json(file.read_text("utf-8"))
        call = dict(manifest["call"])
        steps = int(call["num_inference_steps"])
        counts = manifest.get("step_counts")
        return OwnCall(
            steps,
            None if not counts else tuple(sorted(map(int, counts))),
            call.get(_GUIDANCE),
            {key: value for key, value in call.items() if key not in _GIVEN_ANEW},
            bool(manifest.get("alone")),
            IMAGE in call,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{file} cannot be read ({error}): export the student again") from None


def kept_call(call: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A call as a manifest holds it: the pictures that it draws from are written into the proof of a student's folder.

    Args:
        call: of the pictures of the proof.
        folder: of the student.
    """
    pictures = call.get(IMAGE)
    if pictures is None:
        return dict(call)
    pictures = pictures if isinstance(pictures, list) else [pictures]
    names = [f"{VERIFICATION}/given_{i}.png" for i in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        picture.save(folder / name)
    return {**call, IMAGE: names}


def proof_call(manifest: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The call of a student's proof, with the pictures that it draws from.

    Args:
        manifest: of the proof.
        folder: of the student.
    """
    call = dict(manifest["call"])
    if IMAGE in call:
        from PIL import Image

        call[IMAGE] = [Image.open(folder / name).convert("RGB") for name in call[IMAGE]]
    return call


def proof_calls(manifest: Mapping[str, Any], folder: Path) -> list[tuple[dict[str, Any], list[int]]]:
    """The same as it is drawn, at once or one by one, and the seeds of each part."""
    call, seeds = proof_call(manifest, folder), [int(seed) for seed in manifest["seeds"]]
    if not manifest.get("alone"):
        return [(call, seeds)]
    found = []
    for i, seed in enumerate(seeds):
        own = {IMAGE: call[IMAGE][i]} if IMAGE in call else {}
        found.append(({**call, "prompt": [call["prompt"][i]], **own}, [seed]))
    return found


def proof_prompts(manifest: Mapping[str, Any], folder: Path) -> list[Any] | None:
    """The prompts of a student's proof, with the pictures that they name, or the numbers of its classes."""
    call = manifest["call"]
    prompts: list[Any] | None = call.get("prompt", call.get("class_labels"))
    if prompts is None or IMAGE not in call:
        return prompts
    return [with_picture(words, folder / name) for words, name in zip(prompts, call[IMAGE], strict=True)]


def refuse_pictures(call: Mapping[str, Any], what: str) -> None:
    """Refuses a student that draws from a picture.

    Raises:
        UserError: it is one.
    """
    if IMAGE in call:
        raise UserError(f"{what}: this student draws from a picture, which is not served here yet")


def distilled_at(student: Path) -> float | None:
    """The teacher's guidance scale at which a student was distilled, as its run's recipe says; None without one.

    Args:
        student: its folder, in that of its run.
    """
    recipe = RunFolder(student.parent).recipe
    if not recipe.is_file():
        return None
    found = ((parse_yaml(recipe.read_text("utf-8")) or {}).get("options") or {}).get("guidance")
    return None if found is None else float(found)
