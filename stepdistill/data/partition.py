"""Parts of the prompts, for several students that each learn one (Song et al. 2024, "Multi-student Diffusion
Distillation for Better One-step Generators", 2410.23274): disjoint, together all, and the same in every run."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stepdistill.data.held_out import Rest
from stepdistill.errors import UserError, did_you_mean
from stepdistill.system.emoji import emoji_captions, emoji_groups

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("hash", "consecutive", "groups")


def place_of(part: str) -> tuple[int, int]:
    """(k, K) of ``data.part``, counted from 0.

    Raises:
        UserError: it is not k/K with 1 <= k <= K.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"data.part is {part}: give k/K with k from 1 to K, such as 1/4")
    return int(found[1]) - 1, int(found[2])


def check_partition(partition: str) -> None:
    """A partition is known, or a file that is there.

    Raises:
        UserError: it is neither.
    """
    if partition not in KINDS and not Path(partition).is_file():
        known = did_you_mean(partition, KINDS)
        raise UserError(f"data.partition is {partition}: there is no such file and no such partition {known}")


def parts_of(prompts: Sequence[str], partition: str, count: int) -> Tensor:
    """The part of each prompt [P], from 0 to ``count`` - 1; every part has some.

    Args:
        prompts: all of a run.
        partition: ``hash``, by the SHA-256 of each prompt; ``consecutive``, equal stretches of their order;
            ``groups``, whole Unicode groups of the embedded captions, of as equal sizes as they allow; or a file with a
            line for each prompt that names its key, whose keys are shared out so (``stepdistill partition`` makes one).
            Prompts that are held out have their line, too.
        count: of parts.

    Raises:
        UserError: the partition has fewer keys than parts or does not fit the prompts, or leaves a part empty.
    """
    import torch

    check_partition(partition)
    if partition == "hash":
        digests = (hashlib.sha256(prompt.encode()).digest()[:8] for prompt in prompts)
        found = torch.tensor([int.from_bytes(digest, "little") % count for digest in digests])
    elif partition == "consecutive":
        found = torch.arange(len(prompts)) * count // len(prompts)
    else:
        found = _by_key(_keys(prompts, partition), partition, count)
    if len(found.unique()) < count:
        raise UserError(
            f"data.part asks for {count} parts of {len(prompts)} prompts, of which one would have none: take fewer"
        )
    return found


def _keys(prompts: Sequence[str], partition: str) -> list[str]:
    """The key of each prompt."""
    if partition == "groups":
        if list(prompts) != emoji_captions():
            raise UserError(
                "data.partition is groups, which are the Unicode groups of the embedded captions, but data.prompts has "
                "others: take hash, consecutive or a file with a key a line"
            )
        return emoji_groups()
    lines = Path(partition).read_text("utf-8").splitlines()
    count = prompts.whole if isinstance(prompts, Rest) else len(prompts)
    if len(lines) != count:
        raise UserError(
            f"data.partition {partition} has {len(lines)} lines, and there are {count} prompts: give one key for each, "
            "in their order"
        )
    return prompts.like(lines) if isinstance(prompts, Rest) else lines


def _by_key(keys: Sequence[str], partition: str, count: int) -> Tensor:
    """Whole keys shared out: the largest first, each to the part that is smallest so far."""
    import torch

    sizes = Counter(keys)
    if len(sizes) < count:
        raise UserError(
            f"data.part asks for {count} parts, but data.partition {partition} has {len(sizes)} keys: take fewer parts"
        )
    filled, owner = [0] * count, dict[str, int]()
    for key, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        owner[key] = filled.index(min(filled))
        filled[owner[key]] += size
    return torch.tensor([owner[key] for key in keys])
