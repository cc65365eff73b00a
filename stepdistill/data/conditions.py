"""Texts encoded: each different one once, whoever asks for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stepdistill.data.row_cache import RowCache
from stepdistill.data.texts import rows_sha256
from stepdistill.families.condition import Condition
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.networks.tiles import tiles_of
from stepdistill.system.shipped import cache_folder


class Conditions:
    """What a teacher's encoder makes of texts; on the disk it is known by the encoder and the texts.

    Args:
        teacher: whose encoder.
        texts: not held, if they are not.
        what: they are, for messages.
        remake: whether damaged shards are made again.

    Attributes:
        sha256: of the texts.
        rows: of the different ones; to be made before any is taken.
    """

    def __init__(
        self,
        teacher: PipelineTeacher,
        texts: Sequence[str],
        what: str = "prompts",
        remake: bool = False,
    ) -> None:
        self.count, self.sha256 = len(texts), rows_sha256(texts)
        first, self._row = distinct(texts)

        def encode(rows: list[int]) -> dict[str, Tensor]:
            numbers = rows if first is None else first[rows].tolist()
            return dict(teacher.codec.encode([texts[i] for i in numbers]).tensors)

        def place() -> Path:
            source, tiles = self.sha256, tiles_of(teacher.pipe.components.get("vae"))
            if teacher.family.from_picture and tiles:
                source += f" {sorted(tiles.items())}"  # their seams are in the picture's latents
            return cached_at("conditions", teacher, teacher.encoder_fingerprint(), source)

        count = self.count if first is None else len(first)
        self.rows = RowCache(count, encode, place, what, remake)

    def take(self, index: Tensor) -> Condition:
        """The conditions of the texts ``index`` [B], on the CPU."""
        return Condition(self.rows.take(index if self._row is None else self._row[index]))


def cached_at(kind: str, teacher: PipelineTeacher, weights: str, source: str) -> Path:
    """Where rows of a kind lie that are made of ``source``, a SHA-256, by those weights at the teacher's size."""
    key = f"{weights} {type(teacher.pipe).__name__} {teacher.family.name} {teacher.size} {source}"
    return cache_folder() / kind / hashlib.sha256(key.encode()).hexdigest()[:16]


def distinct(texts: Sequence[str]) -> tuple[Tensor | None, Tensor | None]:
    """Where each different text stands first [D], in their order, and for every text [N] which of those it is; both
    None where all differ. Texts are told apart by hashes of 128 bits."""
    hashes = bytearray()
    for text in texts:
        hashes += hashlib.blake2b(text.encode(), digest_size=16).digest()
    words = np.frombuffer(hashes, np.uint64).reshape(-1, 2)
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable: equal ones stay in their order
    sorted_words = words[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (sorted_words[1:] != sorted_words[:-1]).any(1)
    if begins.all():
        return None, None
    first = order[begins]
    by_place = np.argsort(first)
    number = np.empty(len(first), np.int64)
    number[by_place] = np.arange(len(first))
    row = np.empty(len(order), np.int64)
    row[order] = number[np.cumsum(begins) - 1]
    return torch.from_numpy(first[by_place]), torch.from_numpy(row)
