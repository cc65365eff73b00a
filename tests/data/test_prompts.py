"""Prompts are an index into their file, and each different one is encoded once."""

from __future__ import annotations

import csv
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import tiny_teacher

from stepdistill.data.conditions import Conditions, distinct
from stepdistill.data.prompts import open_prompts
from stepdistill.data.texts import Texts, lines_sha256, rows_sha256
from stepdistill.errors import UserError

TEXTS = [f'photograph {i} of a café with {i % 7} tables, "late" in the evening' for i in range(20000)]


def as_text(file: Path) -> None:
    file.write_text(
        "\ufeff"
        + "\r\n \r\n".join(TEXTS[:10])
        + "\n"
        + "\r".join(TEXTS[10:20])
        + "\n"
        + "\n".join(TEXTS[20:])
    )


def as_json_lines(file: Path) -> None:
    file.write_text("\n".join(json.dumps({"id": i, "Caption": f" {text} "}) for i, text in enumerate(TEXTS)))


def as_table(file: Path) -> None:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([("id", "prompt"), *enumerate(TEXTS)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "write"), [("a.txt", as_text), ("a.jsonl", as_json_lines), ("a.csv", as_table)]
)
def test_a_prompt_of_a_file_takes_12_bytes_of_memory(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    """Its place; all are looked through while no more than a buffer is held, and read again in any order."""
    write(tmp_path / name)
    tracemalloc.start()
    prompts = open_prompts(tmp_path / name)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(prompts) == len(TEXTS)
    assert held < 14 * len(TEXTS) and most - held < 6 * len(
        TEXTS
    )  # arrays grow by an eighth, and move as they do
    assert [prompts[i] for i in (0, 9, 10, 19, 20, 7777, -1)] == [
        TEXTS[i] for i in (0, 9, 10, 19, 20, 7777, -1)
    ]
    assert prompts[11:17:2] == TEXTS[11:17:2]
    assert rows_sha256(prompts) == rows_sha256(TEXTS) and lines_sha256(prompts) == lines_sha256(TEXTS)
    (tmp_path / name).write_text("another")
    with pytest.raises(UserError, match=f"{name} was altered while it was in use"):
        prompts[3]


def test_cells_of_a_table_may_have_lines_and_quotes(tmp_path: Path) -> None:
    texts = ["one, two", 'a "b"', "first\nsecond", "", "last"]
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("Text", "n"), *((text, i) for i, text in enumerate(texts))])
    prompts = open_prompts(tmp_path / "a.csv")
    assert [prompts[i] for i in range(5)] == list(prompts) == texts


def test_hashes_are_those_of_the_whole() -> None:
    import hashlib

    rows = ["a", ("b", 1), 'c"é']
    assert rows_sha256(iter(rows)) == hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert lines_sha256(iter(["a", "b"])) == hashlib.sha256(b"a\nb").hexdigest()
    assert list(Texts.of(iter(["", " é", "\udce4"]))) == ["", " é", "\udce4"]


def test_distinct_texts_stand_in_their_order() -> None:
    texts = [random.Random(i).choice("abcdefghij") for i in range(60)]
    first, row = distinct(texts)
    assert first is not None and row is not None
    assert [texts[i] for i in first] == list(dict.fromkeys(texts))
    assert [texts[first[i]] for i in row] == texts and first.tolist() == [
        texts.index(texts[i]) for i in first
    ]
    assert distinct(["b", "a", "c"]) == (None, None)


def test_a_prompt_that_stands_twice_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, asked = tiny_teacher("sd"), []
    encode = type(teacher.codec).encode
    monkeypatch.setattr(
        type(teacher.codec), "encode", lambda own, some: asked.extend(some) or encode(own, some)
    )
    texts = ["a fish", "a star", "a fish", "a heart", "a star", "a fish"]
    conditions = Conditions(teacher, texts)
    conditions.rows.make()
    assert asked == ["a fish", "a star", "a heart"] and conditions.count == 6
    found = conditions.take(torch.tensor([5, 1, 0, 3]))["encoder_hidden_states"]
    wanted = encode(teacher.codec, ["a fish", "a star", "a heart"])["encoder_hidden_states"]
    assert torch.equal(found, wanted[[0, 1, 0, 2]])


def test_embeddings_are_known_by_encoder_and_prompts_alone() -> None:
    """Not by the denoiser, which a fine-tune changes."""
    teacher = tiny_teacher("sd")
    before = teacher.encoder_fingerprint(), teacher.vae_fingerprint(), teacher.fingerprint()
    with torch.no_grad():
        next(teacher.denoiser.net.parameters()).add_(1)
        assert (teacher.encoder_fingerprint(), teacher.vae_fingerprint()) == before[:2]
        assert teacher.fingerprint() != before[2]
        next(teacher.pipe.vae.parameters()).add_(1)
        assert teacher.encoder_fingerprint() == before[0] and teacher.vae_fingerprint() != before[1]
        vae = teacher.vae_fingerprint()
        next(teacher.pipe.text_encoder.parameters()).add_(1)
        assert teacher.encoder_fingerprint() != before[0] and teacher.vae_fingerprint() == vae
