"""Students of the parts of a partition as one pipeline, which routes each prompt to the student that learnt it.

Several small students cost at each picture what one of them costs, and hold together what one of them cannot (Song et
al. 2024, "Multi-student Diffusion Distillation", 2410.23274). A prompt of the training goes to its own student. The
rule for any other, the student of the nearest prompt of the training, is a start value of ours [R].
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.export.card import model_card
from stepdistill.export.composed import config_of, write_composed
from stepdistill.export.shared import terms_of
from stepdistill.export.verify import read_manifest
from stepdistill.families import Family, known_family
from stepdistill.families.watching import frames_of, watch
from stepdistill.networks.loading import load_pipeline, with_merged_adapters
from stepdistill.networks.own_call import refuse_pictures
from stepdistill.networks.pictures import strip
from stepdistill.system.float32 import full_float32
from stepdistill.system.log import bar
from stepdistill.system.travelling import travelling_module

AT_ONCE = 64
"""Prompts that are encoded together."""
PLACES = (("encoder_hidden_states",), ("class_labels",))
"""Where networks are told of a prompt."""
_PROMPTS = ("prompt", "class_labels")


@dataclass(frozen=True)
class Member:
    """A student of one part.

    Attributes:
        name: as it was given.
        folder: the student's.
        teacher: its teacher.
        guidance: that it was distilled at.
    """

    name: str
    folder: Path
    teacher: str
    guidance: float


def write_joined(
    members: Sequence[Member],
    prompts: Sequence[str],
    parts: Tensor,
    folder: Path,
    command: str = "",
    device: Any = None,
) -> None:
    """Writes the folder of the routed pipeline.

    Args:
        members: the students, in the order of their parts.
        prompts: all of the partition.
        parts: the part of each [P].
        folder: where to.
        command: for the card.
        device: None takes a GPU where there is one.

    Raises:
        UserError: the students are not alike.
    """
    pipes = [with_merged_adapters(load_pipeline(each.folder, device)[0]) for each in members]
    manifests = [read_manifest(each.folder) for each in members]
    kind = type(pipes[0]).__name__
    refuse_pictures(manifests[0]["call"], "join")
    family = known_family(kind)
    if family is None:
        raise UserError(f"join: a {kind} is not of a family whose prompts are known here")
    _check_alike(members, pipes, manifests, family)
    nets: list[Any] = [getattr(pipe, family.network) for pipe in pipes]
    place, anchors = _anchors(pipes[0], family, manifests[0]["call"], prompts)
    net: Any = travelling_module("routed_experts").RoutedExperts(
        type(nets[0]).__name__, config_of(nets[0]), len(nets), list(place), len(anchors), anchors.shape[1]
    )
    state = {f"students.{i}.{key}": v for i, each in enumerate(nets) for key, v in each.state_dict().items()}
    net.load_state_dict({**state, "anchors": anchors, "owners": parts})
    pipe = copy.copy(pipes[0])
    pipe.register_modules(**{family.network: net.to(pipes[0].device).eval()})
    # One prompt of each part at least, each drawn by its own student alone.
    chosen = [int((parts == k).nonzero()[0, 0]) for k in range(len(members))]
    call = {**manifests[0]["call"], **_of_prompts(manifests[0]["call"], [prompts[i] for i in chosen])}

    @full_float32()
    def draw() -> Tensor:
        pictures = []
        for seed, (one, number) in enumerate(zip(pipes, chosen, strict=True)):
            alone = {**call, **_of_prompts(call, [prompts[number]]), "output_type": "np"}
            alone["generator"] = [torch.Generator("cpu").manual_seed(seed)]
            pictures.append(strip(frames_of(one(**alone, return_dict=False)[0])))
        return torch.cat(pictures)

    first, count = members[0], len(members)
    card = model_card(
        teacher=first.teacher,
        method="join",
        summary=f"{count} students, each of a part of the prompts; a prompt is drawn by the one that learnt it "
        "(arXiv 2410.23274)",
        steps=call["num_inference_steps"],
        guidance=first.guidance,
        call=call,
        grid=f"`{type(pipe.scheduler).__name__}`",
        command=command,
        terms=terms_of(str(first.folder)),
        facts={"prompts of each student": ", ".join(str(int((parts == k).sum())) for k in range(count))},
        pictures=count,
        video=family.video,
    )
    write_composed(
        folder, pipe, family.network, first.folder, call, range(count), draw, card, alone=family.alone
    )


def _check_alike(
    members: Sequence[Member], pipes: Sequence[Any], manifests: Sequence[Any], family: Family
) -> None:
    """All are of one class, size, scheduler and call."""

    def about(pipe: Any, manifest: Any) -> dict[str, str]:
        net, call = getattr(pipe, family.network), manifest["call"]
        said = {key: value for key, value in call.items() if key not in (*_PROMPTS, "batch_size")}
        return {
            "its network": f"{type(net).__name__} {json.dumps(config_of(net), sort_keys=True, default=str)}",
            "its scheduler": f"{type(pipe.scheduler).__name__} {json.dumps(dict(pipe.scheduler.config), default=str)}",
            "its call": json.dumps(said, sort_keys=True),
        }

    first = about(pipes[0], manifests[0])
    for member, pipe, manifest in zip(members[1:], pipes[1:], manifests[1:], strict=True):
        for what, value in about(pipe, manifest).items():
            if value != first[what]:
                raise UserError(
                    f"join: {member.name} differs from {members[0].name} in {what}: train all by one recipe, but for "
                    "data.part"
                )


def _of_prompts(call: dict[str, Any], prompts: Sequence[str]) -> dict[str, Any]:
    """The argument of a call that says these prompts."""
    if "class_labels" in call:
        return {"class_labels": [int(prompt) if prompt.isdecimal() else prompt for prompt in prompts]}
    return {"prompt": list(prompts)}


def _anchors(
    pipe: Any, family: Family, call: dict[str, Any], prompts: Sequence[str]
) -> tuple[tuple[str, ...], Tensor]:
    """Where the pipeline tells its network of a prompt, and what it says of each [P, D]."""
    code, found = travelling_module("routed_experts"), list[Tensor]()
    place: tuple[str, ...] = ()
    shown = bar(len(prompts), "prompts", unit="prompt")
    for first in range(0, len(prompts), AT_ONCE):
        some = list(prompts[first : first + AT_ONCE])
        given = {**call, **_of_prompts(call, some)}
        given["generator"] = [torch.Generator("cpu").manual_seed(0) for _ in some]
        asked = watch(pipe, given, end_at=family.network).calls[-1].kwargs
        here = [each for each in PLACES if isinstance(asked.get(each[0]), Tensor)]
        if not here or len(asked[here[0][0]]) != len(some):
            raise UserError(
                f"join: a {type(pipe).__name__} does not tell its network of each prompt in a row of its own"
            )
        place = here[0]
        found.append(code.told(asked, place).cpu())
        shown.update(len(some))
    shown.close()
    return place, torch.cat(found)
