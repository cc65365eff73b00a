"""Rows are the same numbers in memory and on the disk, are computed once, and have one length."""

from __future__ import annotations

import os
import resource
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepdistill.data import row_cache
from stepdistill.data.row_cache import CHUNK, PROBED, SHARD, RowCache
from stepdistill.data.shards import Shards
from stepdistill.data.sizes import Wanted, check_rooms, pairs_size, rows_size
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition, joined
from stepdistill.system.processes import Processes

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
    """No rows stay in memory."""
    monkeypatch.setattr(row_cache, "MEMORY_BYTES", 0)


def test_on_the_disk_rows_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = RowCache(COUNT, Encoder(), lambda: tmp_path / "unused").make()
    monkeypatch.setattr(row_cache, "MEMORY_BYTES", 0)
    encoder = Encoder()
    cached = RowCache(COUNT, encoder, lambda: tmp_path / "new" / "rows").make()
    assert not (tmp_path / "unused").exists()
    assert len(encoder.asked) == COUNT + PROBED  # some tell how large they are
    # Of a shard whose rows are short, of one whose rows are long, of both.
    for index in (torch.tensor([SHARD + 5]), torch.tensor([3]), torch.tensor([COUNT - 1, 0, SHARD, 2])):
        ours, wanted = cached.take(index), kept.take(index)
        assert ours.keys() == wanted.keys()
        assert all(torch.equal(ours[name], wanted[name]) for name in ours)
        assert ours["embeds"].shape[1] == 7  # the longest of all, whatever the batch
        assert ours["text_mask"].sum(1).tolist() == lengths(index.tolist())
    assert len(encoder.asked) == COUNT + PROBED


def test_few_and_small_rows_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = 4 + 4 + (4 + 1) * 7  # bytes, padded to the longest of those that are probed
    for rows, limit, on_disk in ((50, 50 * row, False), (50, 50 * row - 1, True), (49, 50 * row, True)):
        monkeypatch.setattr(row_cache, "MEMORY_BYTES", limit)
        monkeypatch.setattr(row_cache, "MEMORY_ROWS", rows)
        place = tmp_path / f"{rows} {limit}"
        cache = RowCache(50, Encoder(), lambda place=place: place).make()  # type: ignore[misc]
        assert cache.on_disk == on_disk
        assert place.exists() == on_disk


def test_what_is_on_the_disk_is_not_made_again(small: None, tmp_path: Path) -> None:
    RowCache(COUNT, Encoder(), lambda: tmp_path).make()
    (tmp_path / "rows-00001.safetensors").unlink()
    encoder = Encoder()
    again = RowCache(COUNT, encoder, lambda: tmp_path).make()
    assert encoder.asked[PROBED:] == list(range(SHARD, 2 * SHARD)) and SHARD % CHUNK == 0
    assert again.take(torch.tensor([SHARD + 5]))["pooled"].tolist() == [[SHARD + 5]]


def test_memory_stays_flat_while_rows_are_made_and_read(small: None, tmp_path: Path) -> None:
    """128 MiB of rows, of which a few shards of 4 MiB are ever held."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    held: list[int] = []

    def compute(rows: list[int]) -> dict[str, Tensor]:
        held.append(resident())
        return {"x": torch.tensor(rows, dtype=torch.float32)[:, None].expand(-1, 2**12)}

    cache = RowCache(8192, compute, lambda: tmp_path).make()
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) > 2**27
    for first in range(0, 8192, 64):
        index = torch.arange(first, first + 64) * 37 % 8192
        assert torch.equal(cache.take(index)["x"][:, -1], index.float())
        held.append(resident())
    shutil.rmtree(tmp_path)
    assert max(held) - held[1] < 40 * 2**20


def test_what_was_killed_goes_on_to_the_same_bits(small: None, tmp_path: Path) -> None:
    encoder = Encoder()

    def killed(rows: list[int]) -> dict[str, Tensor]:
        if len(encoder.asked) > PROBED + SHARD + CHUNK:
            raise KeyboardInterrupt
        return encoder(rows)

    RowCache(COUNT, Encoder(), lambda: tmp_path / "whole").make()
    with pytest.raises(KeyboardInterrupt):
        RowCache(COUNT, killed, lambda: tmp_path / "killed").make()
    assert [file.name for file in (tmp_path / "killed").iterdir() if file.suffix] == [
        "rows-00000.safetensors"
    ]
    RowCache(COUNT, Encoder(), lambda: tmp_path / "killed").make()
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()


def test_each_process_makes_its_own_shards(small: None, tmp_path: Path) -> None:
    assert Shards(tmp_path, "rows").missing(range(5), Processes(0, 2)) == [0, 2, 4]
    assert Shards(tmp_path, "rows").missing(range(5), Processes(1, 2)) == [1, 3]


def test_the_disk_must_have_room_before_the_first_row_is_made(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = 4 + 4 + (4 + 1) * 7
    size = rows_size("rows", COUNT, Encoder()(list(range(7))))
    assert (size.row, size.bytes) == (row, COUNT * row)
    assert size.line(Path("there")) == f"rows: 522 x 43 B = {size.bytes / 1024:.1f} KiB in there"
    cache = RowCache(COUNT, encoder := Encoder(), lambda: tmp_path / "rows")
    assert cache.wanted() == Wanted(replace(size, row=row), tmp_path / "rows", 0)
    lines: list[str] = []
    both = [cache.wanted(), Wanted(pairs_size(10, (4, 8, 8)), tmp_path / "pairs", 4)]
    for free in (COUNT * row + 6 * 1024, COUNT * row + 6 * 1024 - 1):
        usage = type(shutil.disk_usage(tmp_path))(10**9, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda place, usage=usage: usage)  # type: ignore[misc]
        says = r"rows \(21.9 KiB\) and pairs \(6.0 KiB\) need 27.9 KiB in .* has 27.9 KiB free: make room"
        with nullcontext() if free % 2 == (COUNT * row) % 2 else pytest.raises(UserError, match=says):
            check_rooms(both, lines.append)
    assert lines[:2] == [
        size.line(tmp_path / "rows"),
        f"pairs: 10 x 1.0 KiB = 10.0 KiB in {tmp_path / 'pairs'}",
    ]
    assert len(encoder.asked) == PROBED
    assert cache.make().wanted() == Wanted(size, tmp_path / "rows", COUNT)


@pytest.mark.parametrize("harm", ["cut off", "one bit", "one bit, long ago"])
def test_a_damaged_shard_is_named_and_made_again_only_when_asked(
    small: None, tmp_path: Path, harm: str
) -> None:
    first = RowCache(COUNT, Encoder(), lambda: tmp_path).make()
    file, row = tmp_path / "rows-00001.safetensors", torch.tensor([SHARD + 200])
    wanted, content = first.take(row), bytearray(file.read_bytes())
    place = content.rindex(torch.tensor(float(SHARD + 200)).numpy().tobytes())
    content[place] ^= 1
    words = r"rows-00001.safetensors is damaged .*: set data.damaged=remake"
    if harm == "one bit, long ago":  # found when the row is read
        file.write_bytes(content)
        os.utime(file, (0, 0))
        with pytest.raises(UserError, match=words):
            RowCache(COUNT, Encoder(), lambda: tmp_path).make().take(row)
        return
    file.write_bytes(content if harm == "one bit" else content[:100])
    encoder = Encoder()
    with pytest.raises(UserError, match=words):
        RowCache(COUNT, encoder, lambda: tmp_path).make()
    assert len(encoder.asked) == PROBED
    again = RowCache(COUNT, Encoder(), lambda: tmp_path, remake=True).make().take(row)
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


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
