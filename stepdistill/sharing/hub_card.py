"""The metadata that the Hub reads from a model card, on top of the card that a student was exported with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepdistill.networks.own_call import IMAGE
from stepdistill.networks.pipeline_files import ADAPTER, INDEX, LORA
from stepdistill.system.parsing import parse_json
from stepdistill.system.parsing_yaml import parse_yaml

HERE = "path/to/this/folder"
"""What stands in a card's snippets for the student's place."""
TEACHER = re.compile(r'"path/to/(?!this/folder)[^"]+"')
"""The same for a teacher that was a folder."""
PATH = re.compile(r"(?<![\w:/.<-])~?/(?:[\w.@+-]+/)+[\w.@+-]+|(?<!\w)[A-Za-z]:\\[\w\\.@+ -]+")


def parted(card: str) -> tuple[dict[str, Any], str]:
    """A card's metadata, which stands before it between two lines of ``---``, and its text."""

    before, _, rest = card.partition("---\n")
    head, end, text = rest.partition("\n---\n")
    found = parse_yaml(head) if end and not before.strip() else None
    return (found, text) if isinstance(found, dict) else ({}, card)


def hub_card(
    card: str,
    *,
    repo: str,
    pipeline: str,
    call: Mapping[str, Any],
    files: Mapping[str, object],
    base_model: str | None,
    licence: str | None,
) -> str:
    """The card with the Hub's metadata, and with snippets that load from the repository.

    Args:
        card: as it was exported.
        repo: OWNER/NAME.
        pipeline: class of its pipeline.
        call: of the verification pictures.
        files: names of the files that are pushed.
        base_model: the teacher on the Hub, if it is there.
        licence: in place of the one that the card states; None keeps that.
    """
    import yaml

    if base_model is not None:
        card = TEACHER.sub(f'"{base_model}"', card)
    (data, text), kind = parted(_from_repo(card, repo)), _pipeline_tag(pipeline, call)
    tags = ["diffusers", kind, "stepdistill", *data.get("tags", ()), "few-step"]
    data |= {
        "library_name": "diffusers",
        "pipeline_tag": kind,
        "tags": list(dict.fromkeys([*tags, "lora"] if LORA in files else tags)),
    }
    if licence is not None:
        data = {key: value for key, value in data.items() if not key.startswith("license")} | {
            "license": licence
        }
    if base_model is not None:
        data |= {
            "base_model": base_model,
            "base_model_relation": "adapter" if ADAPTER in files else "finetune",
        }
    pictures = [
        {"text": text, "output": {"url": f"verification/{i}.png"}}
        for i, text in enumerate(call.get("prompt", ()))
        if f"verification/{i}.png" in files
    ]
    if pictures:
        data["widget"] = pictures
    head = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    return f"---\n{head}---\n{text.lstrip()}"


def _pipeline_tag(pipeline: str, call: Mapping[str, Any]) -> str:
    from stepdistill.families import known_family

    if "prompt" not in call:
        return "unconditional-image-generation"
    family = known_family(pipeline)
    kind = "video" if family is not None and family.video else "image"
    return f"{'image' if IMAGE in call else 'text'}-to-{kind}"


def _from_repo(card: str, repo: str) -> str:
    """A card whose snippets load from the repository; code that is imported from its place is downloaded first."""
    inserted = f'sys.path.insert(0, "{HERE}/scheduler")'
    if inserted in card:
        fetched = f'sys.path.insert(0, snapshot_download("{repo}") + "/scheduler")'
        card = card.replace(inserted, f"from huggingface_hub import snapshot_download\n{fetched}")
    return card.replace(HERE, repo)


def local_paths(name: str, text: str) -> list[str]:
    """Paths of somebody's disk in a file that is pushed: anywhere in a text, and as whole values of a config."""
    if not name.endswith(".json"):
        return PATH.findall(text)
    if Path(name).name not in (INDEX, ADAPTER) and not name.endswith("config.json"):
        return []
    return [value for value in _strings(parse_json(text)) if PATH.fullmatch(value)]


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for each in inner for text in _strings(each)]
