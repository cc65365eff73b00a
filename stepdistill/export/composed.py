"""The folder of a pipeline that is put together from others, without training: with a proof, as a student's has."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stepdistill.export.card import for_folder
from stepdistill.export.original import Original, held_in, in_float32, round_to
from stepdistill.export.shared import carry_terms, take_out_folders
from stepdistill.export.student_folder import TOLERANCE, hashes
from stepdistill.networks.own_call import VERIFICATION, kept_call
from stepdistill.networks.pictures import to_uint8
from stepdistill.networks.tiles import KEY, tiles_of
from stepdistill.system.files import folder_written_whole


def write_composed(
    folder: Path,
    pipe: Any,
    network: str,
    source: Path,
    call: Mapping[str, Any],
    seeds: Sequence[int],
    draw: Callable[[], Tensor],
    card: str,
    *,
    alone: bool = False,
) -> None:
    """Writes a pipeline's folder, replacing an earlier one only when the new one is complete.

    Args:
        folder: where to.
        pipe: the pipeline, with its new network in float32.
        network: the name of that component.
        source: of all other components, which are taken over as they are, and of the types in which weights are saved.
        call: arguments of the call that draws the pictures of its proof.
        seeds: of those.
        draw: the pictures [B, 3, H, W] as they must be, drawn another way; called when weights are as they are saved.
        card: the model card.
        alone: whether the proof's prompts are drawn one at a time.
    """
    from PIL import Image

    original, net = Original(source), getattr(pipe, network)
    types = original.types(network)
    if types.rounds:
        round_to(net, types)
    with folder_written_whole(folder) as place:
        for name, part in pipe.components.items():
            if part is None:
                continue
            if name == network:
                with held_in(part, types) if types.rounds else nullcontext():
                    part.save_pretrained(place / name, max_shard_size=original.shard_size(name))
            elif name == "scheduler":
                part.save_pretrained(place / name)
            else:
                original.save(name, part, place / name)
        pipe.save_config(place)
        carry_terms(str(source), place)
        take_out_folders(place)
        proof = place / VERIFICATION
        proof.mkdir()
        with in_float32(pipe, but=frozenset({network})):
            images = to_uint8(draw())
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(proof / f"{i}.png")
        manifest = {
            "call": kept_call(call, place),
            "seeds": list(seeds),
            "step_counts": [call["num_inference_steps"]],
            "alone": alone,
            "tolerance": TOLERANCE,
            "files": hashes(place),
        }
        if tiles := tiles_of(pipe.components.get("vae")):
            manifest[KEY] = tiles
        (proof / "manifest.json").write_text(json.dumps(manifest, indent=1))
        (place / "README.md").write_text(for_folder(card, place), encoding="utf-8")


def config_of(net: nn.Module) -> dict[str, Any]:
    """A diffusers network's config, without what diffusers notes down beside it."""
    config: Any = net.config
    return {name: value for name, value in config.items() if not name.startswith("_")}
