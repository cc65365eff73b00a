"""The model card of a student."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stepdistill.export.shared import Terms, is_hub_name, loaded_from, shown_name, without_folders
from stepdistill.networks.own_call import IMAGE
from stepdistill.networks.pipeline_files import ADAPTER, LORA, TILED_VAE, components, read_index, tensor_types
from stepdistill.networks.tiles import tiles_in, tiles_in_words
from stepdistill.system.parsing import parse_json
from stepdistill.system.travelling import REASONS, travelling_code

STOCK = "It is made of stock diffusers classes alone."
"""What a model card says of a student without code of its own."""

_CALL = 'from_pretrained("path/to/this/folder")'
PLAIN = f"pipe = DiffusionPipeline.{_CALL}"
"""How a model card loads a folder of which nothing more is to be said."""


@dataclass(frozen=True)
class LoraFacts:
    """Of a student that is one adapter with a file of its own.

    Attributes:
        rank, scale: of it; the scale is alpha over rank.
        scheduler: the class that it draws with.
        module: the file of ours that this travels in; None of diffusers' own.
    """

    rank: int
    scale: float
    scheduler: str
    module: str | None = None

    def loading(self, teacher: str) -> str:
        """Python that puts the adapter on the teacher.

        Args:
            teacher: what that is loaded from.
        """
        place = '"path/to/this/folder'
        load = f"from diffusers import {self.scheduler}\n"
        if self.module:
            load = f'import sys\nsys.path.insert(0, {place}/scheduler")\nfrom {self.module} import {self.scheduler}\n'
        return (
            f'{load}pipe = DiffusionPipeline.from_pretrained("{teacher}")\n'
            f'pipe.load_lora_weights({place}", weight_name="{LORA}")\n'
            f'pipe.scheduler = {self.scheduler}.from_pretrained({place}", subfolder="scheduler")'
        )


def for_folder(card: str, folder: Path) -> str:
    """The model card as it fits a student's folder: how it is loaded, which Python files travel in it and why."""
    if (folder / ADAPTER).is_file():
        return _of_adapter(card, folder)
    parts = (part for part in folder.iterdir() if part.is_dir())
    saved = Counter(kind for part in parts for kind in tensor_types(part).values())
    more = ""
    if {"BF16", "F16"} & saved.keys():
        # Unless it is told, diffusers loads its own networks as float32, and others as they were saved.
        kind = {"BF16": "bfloat16", "F16": "float16"}.get(saved.most_common(1)[0][0], "float32")
        more = f", torch_dtype=torch.{kind}"
        if "import torch\n" not in card:
            card = card.replace("```python\nfrom", "```python\nimport torch\nfrom")
    if travelling_code(folder):
        more += ", trust_remote_code=True"
        card = card.replace(STOCK, _code_note(folder))
    return card.replace(_CALL, f"{_CALL[:-1]}{more}){_tiles(folder)}")


def _tiles(folder: Path) -> str:
    """Lines that have the VAE decode as it did; each begins a new one."""
    said = tiles_in(folder)
    if not (folder / ADAPTER).is_file() and components(read_index(folder)).get("vae", ("",))[-1] == TILED_VAE:
        said |= {"use_tiling": True}
    return "".join(f"\n{line}" for line in tiles_in_words(said))


def _of_adapter(card: str, folder: Path) -> str:
    """The card of an adapter alone."""
    of = parse_json((folder / ADAPTER).read_text("utf-8"))
    config = parse_json((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    found = travelling_code(folder)
    facts = LoraFacts(0, 1.0, str(config["_class_name"]), found[0].stem if found else None)
    text = facts.loading(loaded_from(of["teacher"]))
    note = (
        _code_note(folder) if found else "It is an adapter for stock diffusers classes, without the teacher."
    )
    return card.replace(PLAIN, f"{text}{_tiles(folder)}").replace(STOCK, note)


def _code_note(folder: Path) -> str:
    found = travelling_code(folder)
    names = ", ".join(f"`{path.relative_to(folder).as_posix()}`" for path in found)
    alone = (folder / ADAPTER).is_file()
    loads = "" if alone else ", and loads with `trust_remote_code=True` alone"
    return (
        f"**It carries code of its own, {names}{loads}**: "
        f"{'; '.join(REASONS[path.name] for path in found)}. The code imports torch and diffusers only; `stepdistill "
        "verify` checks that it is what stepdistill ships. All else is stock, and diffusers logs while loading that it "
        "expected a stock class."
    )


CARD = """---
{metadata}---
# {title}

{pictures}A student of `{teacher}` that draws in {steps} step(s), distilled with the method `{method}` of stepdistill.

```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
{shown} = pipe({call}).{field}[0]
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
{rows}| trained with | `{command}` |

{changes}{lora}{scores}

`verification/` holds pictures drawn by the trainer, their prompts and seeds, and the hash of every file;
`stepdistill verify` draws them again with plain diffusers.
"""


LORA_SECTION = """The adapter lies beside the merged weights; on the teacher it gives the same pictures:

```python
from diffusers import DiffusionPipeline
{loading}
```

"""


_LOADING = """from diffusers import DiffusionPipeline
from diffusers.utils import load_image
from PIL import ImageOps
picture = ImageOps.fit(load_image("picture.png"), ({width}, {height}))
"""
"""How a model card makes a picture that a student draws from of the size that it learnt."""


def _task(kind: str, prompted: bool, drawn_from: bool) -> str:
    """What the Hub calls what a pipeline does, which draws images or videos."""
    if not prompted:
        return f"unconditional-{kind}-generation"
    return f"{'image' if drawn_from else 'text'}-to-{kind}"


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
    terms: Terms | None = None,
    facts: Mapping[str, str] | None = None,
    pictures: int = 0,
    lora: LoraFacts | None = None,
    alone: bool = False,
    video: bool = False,
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
        terms: of the teacher, which hold for the student.
        facts: what else stands in the table.
        pictures: how many of the student's own to show.
        lora: where the student is an adapter.
        alone: whether it is exported as that alone.
        video: whether it draws videos.
    """
    shown = {k: (v[0] if isinstance(v, list) and k == "prompt" else v) for k, v in call.items()}
    shown.pop("batch_size", None)
    drawn_from = shown.pop(IMAGE, None) is not None
    if isinstance(shown.get("class_labels"), list):
        shown["class_labels"] = shown["class_labels"][:1]
    scale = call.get("guidance_scale")
    note = "."
    if scale == 0:
        note = " and **`guidance_scale=0`**: guidance is in the weights, diffusers' default would apply it twice."
    elif scale is not None:
        note = f" and the `guidance_scale` you want, such as {scale:g}: it is an input of the network."
    name, terms = shown_name(teacher), terms or Terms({}, None, ())
    base = teacher if is_hub_name(teacher) else terms.base_model
    kind = "video" if video else "image"
    metadata = {
        "library_name": "diffusers",
        **({"base_model": base} if base else {}),
        **terms.metadata,
        "pipeline_tag": _task(kind, "prompt" in call, drawn_from),
        "tags": ["stepdistill", "distillation", "few-step", method, *(["lora"] if lora else [])],
    }
    more = {"LoRA": f"rank {lora.rank}, scale {lora.scale:g}, `{LORA}`"} if lora else {}
    shown_pictures = " ".join(f"![{i}](verification/{i}.png)" for i in range(pictures))
    card = CARD
    if drawn_from:
        sides = _LOADING.format(width=call["width"], height=call["height"])
        card = CARD.replace("from diffusers import DiffusionPipeline\n", sides)
    return card.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        title=f"{name} in {steps} step{'s' * (steps > 1)} ({method})",
        pictures=f"{shown_pictures}\n\n" if pictures else "",
        rows="".join(f"| {key} | {value} |\n" for key, value in {**more, **(facts or {})}.items()),
        lora=LORA_SECTION.format(loading=lora.loading(loaded_from(teacher))) if lora and not alone else "",
        teacher=name,
        method=method,
        steps=steps,
        shown=kind,
        field="frames" if video else "images",
        call="image=picture, " * drawn_from + ", ".join(f"{key}={value!r}" for key, value in shown.items()),
        guidance_note=note,
        guidance=f"{guidance:g}",
        summary=summary,
        grid=grid,
        command=without_folders(command),
        changes=f"The teacher as it was taken: {' '.join(changes)}\n\n" if changes else "",
        scores=scores,
    )
