"""Rows are the same numbers in memory and on the disk, are computed once, and have one length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepdistill.data import row_cache
from stepdistill.data.row_cache import CHUNK, SHARD, RowCache
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition, joined

COUNT = 2 * SHARD + 10


def lengths(rows: list[int]) -> list[int]:
    return [1 + row % 7 if row < SHARD else 1 + row % 3 for row in rows]


class Encoder:
    """Row i is i, and a sequence of i % 7 + 1 times i, padded to the longest of those computed together."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, rows: list[int]) -> dict[str, Tensor]:
        self.asked += rows
        own = torch.tensor(lengths(rows))
        mask = torch.arange(int(own.max())) < own[:, None]
        number = torch.tensor(rows, dtype=torch.float32)
        embeds = (mask * number[:, None])[..., None]
        return {"number": number, "pooled": number[:, None], "embeds": embeds, "text_mask": mask}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rows fit in memory."""
    monkeypatch.setattr(row_cache, "CACHE_BYTES", 0)


def test_on_the_disk_rows_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = RowCache(COUNT, Encoder(), lambda: tmp_path / "unused")
    monkeypatch.setattr(row_cache, "CACHE_BYTES", 0)
    encoder = Encoder()
    cached = RowCache(COUNT, encoder, lambda: tmp_path / "new" / "rows")
    assert not (tmp_path / "unused").exists()
    assert len(encoder.asked) == COUNT + 1  # the first tells how large they are
    # Of a shard whose rows are short, of one whose rows are long, of both.
    for index in (torch.tensor([SHARD + 5]), torch.tensor([3]), torch.tensor([COUNT - 1, 0, SHARD, 2])):
        ours, wanted = cached.take(index), kept.take(index)
        assert ours.keys() == wanted.keys()
        assert all(torch.equal(ours[name], wanted[name]) for name in ours)
        assert ours["embeds"].shape[1] == 7  # the longest of all, whatever the batch
        assert ours["text_mask"].sum(1).tolist() == lengths(index.tolist())
    assert len(encoder.asked) == COUNT + 1


def test_rows_stay_in_memory_up_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = 4 + 4 + 4 * 1 + 1  # bytes of the first, of which all are counted as large
    for limit, on_disk in ((10 * row, False), (10 * row - 1, True)):
        monkeypatch.setattr(row_cache, "CACHE_BYTES", limit)
        RowCache(10, Encoder(), lambda limit=limit: tmp_path / str(limit))  # type: ignore[misc]
        assert (tmp_path / str(limit)).exists() == on_disk


def test_what_is_on_the_disk_is_not_made_again(small: None, tmp_path: Path) -> None:
    RowCache(COUNT, Encoder(), lambda: tmp_path)
    (tmp_path / "rows-00001.safetensors").unlink()
    encoder = Encoder()
    again = RowCache(COUNT, encoder, lambda: tmp_path)
    assert encoder.asked[1:] == list(range(SHARD, 2 * SHARD)) and SHARD % CHUNK == 0
    assert again.take(torch.tensor([SHARD + 5]))["pooled"].tolist() == [[SHARD + 5]]


def test_a_damaged_shard_is_named(small: None, tmp_path: Path) -> None:
    RowCache(COUNT, Encoder(), lambda: tmp_path)
    file = tmp_path / "rows-00001.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"rows-00001.safetensors is damaged .*delete it"):
        RowCache(COUNT, Encoder(), lambda: tmp_path)


def test_sequences_of_several_lengths_need_a_mask_to_be_joined() -> None:
    short, long = (Condition({"embeds": torch.ones(1, count, 2)}) for count in (2, 5))
    with pytest.raises(ValueError, match=r"'embeds' of \(2, 2\) and \(5, 2\) have no mask"):
        short.join(long)
    masked = [
        Condition({**one.tensors, "embeds_mask": torch.ones(1, one["embeds"].shape[1], dtype=torch.bool)})
        for one in (short, long)
    ]
    both = joined(masked)
    assert both["embeds"].sum((1, 2)).tolist() == [4, 10] and both["embeds_mask"].sum(1).tolist() == [2, 5]
