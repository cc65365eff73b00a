"""The model card of a student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.system.travelling import REASONS, travelling_code

STOCK = "It is made of stock diffusers classes alone."
"""What a model card says of a student without code of its own."""


def with_code_note(card: str, folder: Path) -> str:
    """The model card of a student folder; where Python files travel in it, it says which, why, and how to load."""
    found = travelling_code(folder)
    if not found:
        return card
    names = ", ".join(f"`{path.relative_to(folder).as_posix()}`" for path in found)
    note = (
        f"**It carries code of its own, {names}, and loads with `trust_remote_code=True` alone**: "
        f"{'; '.join(REASONS[path.name] for path in found)}. The code imports torch and diffusers only; `stepdistill "
        "verify` checks that it is what stepdistill ships. All else is stock, and diffusers logs while loading that it "
        "expected a stock class."
    )
    plain = 'from_pretrained("path/to/this/folder")'
    return card.replace(plain, plain[:-1] + ", trust_remote_code=True)").replace(STOCK, note)


CARD = """---
library_name: diffusers
{base}pipeline_tag: {tag}
tags: [stepdistill, distillation, few-step, {method}]
---
# {title}

A student of `{teacher}` that draws in {steps} step(s), distilled with the method `{method}` of stepdistill.

```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
image = pipe({call}).images[0]
```

It is made of stock diffusers classes alone. **Pass `num_inference_steps={steps}`**{guidance_note} The step grid is in
`scheduler/scheduler_config.json`.

| | |
| --- | --- |
| teacher | `{teacher}` |
| method | {summary} |
| teacher's guidance, now in the weights | {guidance} |
| network calls an image | {steps} |
| step grid | {grid} |
| trained with | `{command}` |

{changes}{scores}

`verification/` holds pictures drawn by the trainer, their prompts and seeds, and the hash of every file;
`stepdistill verify` draws them again with plain diffusers.
"""


def model_card(
    *,
    teacher: str,
    method: str,
    summary: str,
    steps: int,
    guidance: float,
    call: Mapping[str, Any],
    grid: str,
    command: str,
    changes: Sequence[str] = (),
    scores: str = "",
) -> str:
    """The Markdown of a student's README.md.

    Args:
        teacher: its name as the recipe gave it.
        method, summary: name and first line of the method.
        steps: network calls of the student.
        guidance: the teacher's guidance scale.
        call: arguments of the verification call.
        grid: its scheduler and the times at which that calls the network.
        command: what made the student.
        changes: what was changed in the teacher when it was taken.
        scores: a Markdown table of them; empty before evaluation.
    """
    shown = {k: (v[0] if isinstance(v, list) and k == "prompt" else v) for k, v in call.items()}
    shown.pop("batch_size", None)
    if isinstance(shown.get("class_labels"), list):
        shown["class_labels"] = shown["class_labels"][:1]
    scale = call.get("guidance_scale")
    note = "."
    if scale == 0:
        note = " and **`guidance_scale=0`**: guidance is in the weights, diffusers' default would apply it twice."
    elif scale is not None:
        note = f" and the `guidance_scale` you want, such as {scale:g}: it is an input of the network."
    hub = teacher.count("/") == 1 and not Path(teacher).exists()
    return CARD.format(
        base=f"base_model: {teacher}\n" if hub else "",
        tag="text-to-image" if "prompt" in call else "unconditional-image-generation",
        method=method,
        title=f"{teacher} in {steps} step{'s' * (steps > 1)} ({method})",
        teacher=teacher,
        steps=steps,
        call=", ".join(f"{key}={value!r}" for key, value in shown.items()),
        guidance_note=note,
        guidance=f"{guidance:g}",
        summary=summary,
        grid=grid,
        command=command,
        changes=f"The teacher as it was taken: {' '.join(changes)}\n\n" if changes else "",
        scores=scores,
    )
