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
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.errors import UserError
from stepdistill.system.files import written_whole

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


SETTINGS = "export.json"
GENEVAL_2 = "vqa_list"
"""What a line of GenEval 2's prompts has and one of GenEval's has not."""
SAVERS = 4
"""Threads that write pictures."""


def read_metadata(file: Path) -> list[tuple[str, str]]:
    """The lines of evaluation_metadata.jsonl as they are, each with its prompt.

    Raises:
        UserError: no such file, no line in it, or a line that is no object with a prompt.
    """
    try:
        lines = [line for line in file.read_text("utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompts {file} cannot be read ({error}): give GenEval's evaluation_metadata.jsonl"
        ) from None
    rows = []
    for i, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
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
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; give a folder")
    file = output / SETTINGS
    if file.is_file():
        try:
            return dict(json.loads(file.read_text("utf-8")))
        except (UnicodeDecodeError, json.JSONDecodeError, TypeError, ValueError):
            raise UserError(f"{file} is damaged: remove {output}, or give another --output") from None
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output {output} holds other files (it has no {SETTINGS}): give a new folder")
    return None


def export_geneval(
    pipeline: Any,
    prompts: Path,
    output: Path,
    *,
    steps: int = 4,
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
        steps: network evaluations per picture.
        samples: pictures of each prompt; picture j of prompt i is drawn with
            torch.Generator("cpu").manual_seed(seed + samples * i + j), at the pipeline's own size.
        guidance: guidance_scale; None is no guidance.
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
    drawing = Drawing(pipe, suite, texts, guidance, trailing)
    settings = {
        "weights_sha256": weights,
        "prompts_sha256": sha256_of(prompts),
        "steps": steps,
        "samples": samples,
        "guidance": drawing.guidance,
        "seed": seed,
        "trailing": trailing,
    }
    _check_same(output, begun, settings)
    output.mkdir(parents=True, exist_ok=True)
    if begun is None:
        _write(output / SETTINGS, json.dumps({"pipeline": label, **settings}, indent=1))
    pictures = [
        output / f"{i:05}" / "samples" / f"{j:04}.png" for i in range(len(rows)) for j in range(samples)
    ]
    missing = [k for k, picture in enumerate(pictures) if not picture.is_file()]
    with bar(len(missing), f"GenEval, {len(rows)} prompts", unit="image", shown=progress) as shown:
        done, saving = 0, list[Future[None]]()
        with ThreadPoolExecutor(SAVERS) as pool:  # a batch is written while the next is drawn
            for pixels in drawing.batches(steps, batch, missing):
                _finish(saving)
                for k, image in zip(missing[done:], pixels.permute(0, 2, 3, 1).numpy(), strict=False):
                    _make_place(pictures[k], rows[k // samples][0])
                    saving.append(pool.submit(_save, pictures[k], image))
                done += len(pixels)
                shown.update(len(pixels))
            _finish(saving)
    if GENEVAL_2 in json.loads(rows[0][0]):
        paths = {prompt: str(pictures[samples * i]) for i, (_, prompt) in enumerate(rows)}
        _write(output / "image_paths.json", json.dumps(paths, indent=1))
    return len(missing)


def _check_same(output: Path, begun: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> None:
    other = [key for key, value in settings.items() if begun is not None and begun.get(key) != value]
    if begun is not None and other:
        told = ", ".join(f"{key} {begun.get(key)}, not {settings[key]}" for key in other)
        raise UserError(f"{output} holds an export with {told}: give another --output")


def _make_place(picture: Path, metadata: str) -> None:
    """A prompt that has pictures has its line: GenEval reads both."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    line = picture.parent.parent / "metadata.jsonl"
    if not line.is_file():
        _write(line, metadata + "\n")


def _save(picture: Path, image: NDArray[Any]) -> None:
    """A picture that is there is whole. The fastest compression loses nothing either."""
    from PIL import Image

    with written_whole(picture) as temporary:
        Image.fromarray(image).save(temporary, format="PNG", compress_level=1)


def _finish(saving: list[Future[None]]) -> None:
    """Waits for pictures to be written; what failed is raised."""
    for picture in saving:
        picture.result()
    saving.clear()


def _write(file: Path, text: str) -> None:
    with written_whole(file) as temporary:
        temporary.write_text(text, "utf-8")
