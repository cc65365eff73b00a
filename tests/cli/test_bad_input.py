"""What comes from others is taken or refused in one line, and nothing of it is run: a short part of tests/fuzz.py, and
each input that once was neither."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strange import (
    LAUGH,
    MANIFEST,
    REPORT,
    ROW,
    STATE,
    STATISTICS,
    TARGETS,
    _npy,
    _zip,
    laughing_pickle,
    payload,
)

from stepdistill.cli.doctor_run import examine_run
from stepdistill.data import tars
from stepdistill.data.image_archives import open_images
from stepdistill.data.prompts import open_prompts
from stepdistill.errors import UserError
from stepdistill.evaluation.pickled_statistics import read_pickled_statistics
from stepdistill.evaluation.reference_files import read_reference
from stepdistill.evaluation.suite import load_suite
from stepdistill.export.verify import read_manifest
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.inside import is_inside
from stepdistill.system.log import read_stats
from stepdistill.system.parsing import Unreadable, parse_json
from stepdistill.system.parsing_yaml import DEEPEST, parse_yaml
from stepdistill.system.tensor_files import read_tensors
from stepdistill.training.checkpoint import read_state
from stepdistill.training.run_record import read_run
from stepdistill.training.run_report import read_report


@pytest.mark.parametrize("name", TARGETS)
def test_strange_input_is_taken_or_refused(name: str) -> None:
    target = TARGETS[name]

    @settings(
        max_examples=10,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def each(case: object) -> None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                target.read(Path(folder), case)
            except UserError as error:
                assert str(error).strip()

    each()


@pytest.mark.parametrize(
    "text, said",
    [
        (LAUGH, "stands for more than"),
        ("a: &a [*a]", "lies in what it stands for"),
        ("train: {lr: 1}\ntrain: {lr: 2}", "the key train is there twice"),
        ("[" * 100_000, "nested deeper"),
        ("a: 2026-13-45", "month"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!bool x", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['touch ran']", "could not determine a constructor"),
    ],
)
def test_recipe_of_strange_yaml(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(UserError):
        load_suite(tmp_path / "r.yaml")
    with pytest.raises(UserError, match="is not a YAML value"):
        load_recipe(sets=[f"options={text}"])


@given(st.integers(1, DEEPEST + 1))
@settings(max_examples=5, deadline=None)
def test_yaml_is_as_deep_as_it_may_be(depth: int) -> None:
    value = parse_yaml("[" * depth + "]" * depth)
    for _ in range(depth - 1):
        (value,) = value
    assert value == []
    with pytest.raises(Unreadable):
        parse_yaml("[" * (depth + DEEPEST + 1) + "]" * (depth + DEEPEST + 1))


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, b"\xff", "{"])
def test_json_has_one_kind_of_error(text: str | bytes) -> None:
    with pytest.raises(Unreadable):
        parse_json(text)


def test_command_line_says_one_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(LAUGH)
    command = [sys.executable, "-m", "stepdistill", "train", "r.yaml", "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("stepdistill: r.yaml: not valid YAML in line")
    assert [file.name for file in tmp_path.iterdir()] == ["r.yaml"]


def test_pickles_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(payload())  # the payload does what it is for
    Path("ran").unlink()
    for name in ("a.pkl", "a.pickle", "a.npz"):
        Path(name).write_bytes(payload())
        with pytest.raises(UserError):
            read_reference(Path(name))
    for name in ("a.bin", "a.pt", "a.ckpt", "a.pth"):
        Path(name).write_bytes(payload())
        with pytest.raises(UserError):
            read_tensors(Path(name), "weights")
    torch.save(
        pickle.loads(pickle.dumps({})), "b.bin"
    )  # a zip of torch's own, with the payload in the place of its pickle

    with zipfile.ZipFile("b.bin") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    Path("c.bin").write_bytes(
        _zip({name: payload() if name.endswith("data.pkl") else content for name, content in members.items()})
    )
    with pytest.raises(UserError):
        read_tensors(Path("c.bin"), "weights")
    objects = io.BytesIO()
    np.save(objects, np.array([{}], object), allow_pickle=True)
    head = objects.getvalue().partition(b"\n")[0] + b"\n"
    Path("d.npz").write_bytes(_zip({"mu.npy": head + payload(), "sigma.npy": head + payload()}))
    with pytest.raises(UserError):
        read_reference(Path("d.npz"))
    assert not Path("ran").exists()


def test_pickle_that_stands_for_more_than_memory_has(tmp_path: Path) -> None:
    for name, content in {"a": laughing_pickle(), "b": b"\x80\x04}r\xff\xff\xff\x7f."}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"stands for more|a memo of"):
            read_pickled_statistics(tmp_path / name)


def test_arrays_that_claim_more_than_they_hold(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    file.write_bytes(_zip({"mu.npy": _npy("(3,)", b"\0" * 24), "sigma.npy": _npy("(100000, 100000)")}))
    with pytest.raises(UserError, match="claims"):
        read_reference(file)


@pytest.mark.parametrize("count", ['"x"', "[]", "1e999"])
def test_statistics_of_no_count(tmp_path: Path, count: str) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(
        STATISTICS.replace(b'"{\\"n\\": 10}"', json.dumps(f'{{"n":{count}}}').encode().ljust(15)[:40])
    )
    with pytest.raises(UserError):
        read_reference(file)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..\\x", "C:\\x", "a\0", ""])
def test_names_that_leave_their_folder(tmp_path: Path, name: str) -> None:
    assert not is_inside(name)
    (tmp_path / "verification").mkdir()
    (tmp_path / "verification" / "manifest.json").write_text(json.dumps({**MANIFEST, "files": {name: "0"}}))
    with pytest.raises(UserError, match="no file of the folder"):
        read_manifest(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps({**STATE, "files": {name: "0"}}))
    if name != "a\0":
        with pytest.raises(UserError, match=r"no file of the folder|no readable"):
            read_state(tmp_path)


@pytest.mark.parametrize(
    "wrong", [[], {"call": []}, {"seeds": 1}, {"files": [1]}, {"tolerance": {"max": "x"}}]
)
def test_manifest_of_other_shapes(tmp_path: Path, wrong: object) -> None:
    (tmp_path / "verification").mkdir()
    content = {**MANIFEST, **wrong} if isinstance(wrong, dict) else wrong
    (tmp_path / "verification" / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="export the student again"):
        read_manifest(tmp_path)


def test_run_folder_of_other_shapes(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("method: dmd\n")
    for line in (b"[1]\n", b"\xff\n", b"[" * 100_000 + b"\n"):
        (tmp_path / "stats.jsonl").write_bytes(line)
        with pytest.raises(UserError, match=r"stats\.jsonl"):
            read_stats(tmp_path)
    (tmp_path / "stats.jsonl").write_text(json.dumps(ROW) + "\n")
    status = {
        "state": "stopped",
        "phase": {},
        "update": 1,
        "updates": 2,
        "eta_seconds": None,
        "health": {},
        "pid": 1,
    }
    status |= {"host": "a", "written": "2026-01-01T00:00:00+00:00"}
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert examine_run(tmp_path)
    for wrong in ({"scores": []}, {"scores": {"1": 2}}):
        (tmp_path / "report.json").write_text(json.dumps({**REPORT, **wrong}))
        with pytest.raises(UserError, match="no table of tables"):
            read_report(tmp_path)


def _tar_gz(file: Path, *members: tuple[str, bytes, bytes]) -> None:
    """A compressed tar of members of any type, whose contents need not be theirs."""
    with gzip.open(file, "wb", 1) as stream:
        for name, kind, content in members:
            head = tarfile.TarInfo(name)
            head.type, head.size = kind, len(content)
            stream.write(head.tobuf(tarfile.GNU_FORMAT) + content + b"\0" * (-len(content) % 512))
        stream.write(b"\0" * 1024)


def test_archives_that_stand_for_more_than_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of them is unpacked, in memory or outside."""
    monkeypatch.setattr(tars, "FREE", 1 << 20)
    zeros = bytes(12 << 20)
    made = {
        name: tmp_path / name
        for name in ("a.zip", "b.zip", "a.tar.gz", "b.tar.gz", "a.npz", "b.npz", "a.bin")
    }
    _tar_gz(made["a.tar.gz"], ("0.png", tarfile.REGTYPE, zeros), ("0.txt", tarfile.REGTYPE, b"a"))
    _tar_gz(
        made["b.tar.gz"], ("x", tarfile.GNUTYPE_LONGNAME, bytes(2 << 20)), ("0.txt", tarfile.REGTYPE, b"a")
    )
    for name, kind, member in (
        ("a.zip", zipfile.ZIP_DEFLATED, "../../0.png"),
        ("b.zip", zipfile.ZIP_BZIP2, "0.png"),
        ("b.npz", zipfile.ZIP_BZIP2, "mu.npy"),
        ("a.bin", zipfile.ZIP_DEFLATED, "archive/data.pkl"),
    ):
        with zipfile.ZipFile(made[name], "w", kind) as archive:
            archive.writestr(member, zeros if name == "a.zip" else zeros[: 1 << 20])
    made["a.npz"].write_bytes(_zip({"arr_0.npy": _npy("(1, 100000, 100000, 3)").replace(b"<f8", b"|u1")}))
    del zeros
    assert all(file.stat().st_size < 1 << 17 for file in made.values())
    wanted: list[tuple[Callable[[], object], str]] = [
        (lambda: list(open_images(made["a.zip"])), "claims to hold 12582912 bytes"),
        (lambda: open_images(made["a.tar.gz"]), "unpacks to more than"),
        (lambda: open_prompts(made["a.tar.gz"]), "unpacks to more than"),
        (lambda: open_images(made["b.tar.gz"]), "a header of 2097152 bytes"),
        (lambda: open_prompts(made["b.tar.gz"]), "a header of 2097152 bytes"),
        (lambda: open_images(made["a.npz"]), "of images of 100000 x 100000 pixels"),
        (lambda: read_reference(made["b.npz"]), "compressed by bzip2"),
        (lambda: read_tensors(made["a.bin"], "weights"), "a compressed zip"),
    ]
    tracemalloc.start()
    for call, said in wanted:
        with pytest.raises(UserError, match=said) as refused:
            call()
        assert "\n" not in str(refused.value)
    source = open_images(made["b.zip"], workers=0)
    assert list(source) == [] and "bzip2" in source.skipped[0].reason
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4 << 20, most
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(made)
    assert not (tmp_path.parents[1] / "0.png").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_links_and_pipes_are_no_files_to_wait_for(tmp_path: Path) -> None:
    """Nobody writes to the pipes: whoever opens one waits for ever."""
    run, images = tmp_path / "run", tmp_path / "images"
    for folder, names in ((run, ("status.json", "stats.jsonl", "report.json")), (images, ("a.png", "a.txt"))):
        folder.mkdir()
        for name in names:
            os.mkfifo(folder / name)
    (run / "recipe.yaml").write_text("method: dmd\n")
    (run / "pictures").symlink_to(run)
    (images / "loop").symlink_to(images)
    (images / "b.png").symlink_to("/dev/zero")
    assert examine_run(run) and read_run(run).state == "not known"
    with pytest.raises(UserError, match="holds no images"):
        open_images(images)
