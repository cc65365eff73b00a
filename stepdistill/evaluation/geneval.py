"""Pictures in the folder format of GenEval (Ghosh, Hajishirzi and Schmidt 2023, 2310.11513), whose object detector then
scores them in an environment of its own:

    FOLDER/00000/metadata.jsonl         line 0 of evaluation_metadata.jsonl
    FOLDER/00000/samples/0000.png ...   its pictures
    FOLDER/export.json                  what drew them
    FOLDER/image_paths.json             prompt -> picture, as GenEval 2 (2512.16853) reads it; of its prompts only

An export that was stopped goes on: pictures that are there are kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.errors import UserError
from stepdistill.evaluation.picture_folder import read_settings, refuse_other, saver, write_text
from stepdistill.networks.find import find_pipeline
from stepdistill.networks.own_call import own_call, steps_of
from stepdistill.system.log import say
from stepdistill.system.parsing import Unreadable, parse_json

if TYPE_CHECKING:
    import torch


SETTINGS = "export.json"
GENEVAL_2 = "vqa_list"
"""What a line of GenEval 2's prompts has and one of GenEval's has not."""


def read_metadata(file: Path) -> list[tuple[str, str]]:
    """The lines of evaluation_metadata.jsonl as they are, each with its prompt.

    Raises:
        UserError: no such file, no line in it, or a line that is no object with a prompt.
    """
    try:
        lines = [line for line in file.read_text("utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(
            f"--prompts {file} cannot be read: {why}; give GenEval's evaluation_metadata.jsonl"
        ) from None
    rows = []
    for i, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
        except Unreadable:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise UserError(
                f"--prompts {file}: line {i} is no object with a prompt: give GenEval's evaluation_metadata.jsonl"
            )
        rows.append((line, row["prompt"]))
    if not rows:
        raise UserError(f"--prompts {file} holds no line: give GenEval's evaluation_metadata.jsonl")
    return rows


def check_export(output: Path) -> dict[str, Any] | None:
    """The settings of the export that a folder holds; None where it is new or empty.

    Raises:
        UserError: it is a file, or a folder that holds something else.
    """
    return read_settings(output, SETTINGS)


def export_geneval(
    pipeline: Any,
    prompts: Path,
    output: Path,
    *,
    steps: int | None = None,
    samples: int = 4,
    guidance: float | None = None,
    seed: int = 0,
    batch: int = 8,
    trailing: bool = False,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> int:
    """Draw the pictures of GenEval's prompts into its folder format; those that are there already are kept.

    Args:
        pipeline: a pipeline object, or a folder or name as :func:`stepdistill.evaluation.evaluate.evaluate` takes it.
        prompts: evaluation_metadata.jsonl, an object with a prompt a line; GenEval 2's file does as well.
        output: the folder.
        steps: network calls per picture; None is a student's own count, and 25 of any other pipeline.
        samples: pictures of each prompt; picture j of prompt i is drawn with
            torch.Generator("cpu").manual_seed(seed + samples * i + j), at the pipeline's own size.
        guidance: guidance_scale; None is that of a student's own call, and none of any other pipeline.
        seed: see ``samples``.
        batch: pictures drawn at a time.
        trailing: as in ``evaluate``: for teachers.
        device: where to draw; None as in ``evaluate``.
        progress: show a bar.

    Returns:
        How many pictures were drawn now.

    Raises:
        UserError: the prompts cannot be read, the pipeline takes none, or the folder holds another export or other
            files.
    """
    rows = read_metadata(prompts)
    begun = check_export(output)
    own = own_call(find_pipeline(pipeline)) if isinstance(pipeline, (str, Path)) else None
    steps = steps_of(own, steps)
    if own is not None:
        if (warning := own.warning(guidance)) is not None:
            say(warning)
        guidance = own.input_guidance if guidance is None else guidance
    from stepdistill.evaluation.drawing import Drawing
    from stepdistill.evaluation.suite import Suite
    from stepdistill.networks.fingerprint import weights_hash
    from stepdistill.networks.loading import load_pipeline
    from stepdistill.system.files import sha256_of
    from stepdistill.system.log import bar

    weights = weights_hash(pipeline)
    pipe, label = load_pipeline(pipeline, device)
    suite = Suite(
        name="geneval", version=1, n=0, first_seed=seed, resolution=0, draw_resolution="own",
        reference="", kid=False, clip_score=False, teacher_steps=1,
    )  # fmt: skip
    texts = [prompt for _, prompt in rows for _ in range(samples)]
    drawing = Drawing(pipe, suite, texts, guidance, trailing, own=own.arguments if own else None)
    settings = {
        "weights_sha256": weights,
        "prompts_sha256": sha256_of(prompts),
        "steps": steps,
        "samples": samples,
        "guidance": drawing.guidance,
        "seed": seed,
        "trailing": trailing,
    }
    refuse_other(output, begun, settings)
    output.mkdir(parents=True, exist_ok=True)
    if begun is None:
        write_text(output / SETTINGS, json.dumps({"pipeline": label, **settings}, indent=1))
    pictures = [
        output / f"{i:05}" / "samples" / f"{j:04}.png" for i in range(len(rows)) for j in range(samples)
    ]
    missing = [k for k, picture in enumerate(pictures) if not picture.is_file()]
    with bar(len(missing), f"GenEval, {len(rows)} prompts", unit="image", shown=progress) as shown:
        done = 0
        with saver() as saving:  # a batch is written while the next is drawn
            for pixels in drawing.batches(steps, batch, missing):
                saving.settle()
                for k, image in zip(missing[done:], pixels.permute(0, 2, 3, 1).numpy(), strict=False):
                    _make_place(pictures[k], rows[k // samples][0])
                    saving.put(pictures[k], image)
                done += len(pixels)
                shown.update(len(pixels))
    if GENEVAL_2 in parse_json(rows[0][0]):
        paths = {prompt: str(pictures[samples * i]) for i, (_, prompt) in enumerate(rows)}
        write_text(output / "image_paths.json", json.dumps(paths, indent=1))
    return len(missing)


def _make_place(picture: Path, metadata: str) -> None:
    """A prompt that has pictures has its line: GenEval reads both."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    line = picture.parent.parent / "metadata.jsonl"
    if not line.is_file():
        write_text(line, metadata + "\n")
