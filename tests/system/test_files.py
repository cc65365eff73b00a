"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stepdistill.system import files
from stepdistill.system.files import PerProcess, folder_written_whole, sha256_of, written_whole


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text("old")
    with written_whole(file) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old" and temporary.parent == tmp_path
    assert file.read_text() == "new" and [place.name for place in tmp_path.iterdir()] == ["report.json"]


def test_what_is_written_has_the_modes_of_the_umask(tmp_path: Path) -> None:
    """Whatever wrote it; a hard link keeps what its other name has."""
    for mask in (0o022, 0o002, 0o027):
        before = os.umask(mask)
        try:
            with folder_written_whole(tmp_path / f"{mask}") as temporary:
                (temporary / "inner").mkdir(mode=0o700)
                (temporary / "inner" / "weights").touch(mode=0o600)
                (tmp_path / f"own-{mask}").touch(mode=0o600)
                os.link(tmp_path / f"own-{mask}", temporary / "linked")
            with written_whole(tmp_path / f"file-{mask}") as temporary:
                temporary.touch(mode=0o600)
        finally:
            assert os.umask(before) == mask
        folder = tmp_path / f"{mask}"
        for place, kind in (
            (folder, 0o777),
            (folder / "inner", 0o777),
            (folder / "inner" / "weights", 0o666),
        ):
            assert place.stat().st_mode & 0o777 == kind & ~mask
        assert (tmp_path / f"file-{mask}").stat().st_mode & 0o777 == 0o666 & ~mask
        assert (folder / "linked").stat().st_mode & 0o777 == 0o600


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), written_whole(file) as temporary:
        temporary.write_text("half of")
        raise ZeroDivisionError
    assert file.read_text() == "old" and [place.name for place in tmp_path.iterdir()] == ["report.json"]


def test_a_folder_is_replaced_as_one(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "student"
    for content in ("first", "second"):
        with folder_written_whole(folder) as temporary:
            (temporary / content).write_text(content)
        assert [place.name for place in folder.iterdir()] == [content]
    (folder.parent / ".student.part").mkdir()  # of a process that was killed
    (folder.parent / ".student.part" / "left").touch()
    with pytest.raises(ZeroDivisionError), folder_written_whole(folder) as temporary:
        assert not any(temporary.iterdir())
        raise ZeroDivisionError
    assert [place.name for place in folder.iterdir()] == ["second"]
    assert [place.name for place in folder.parent.iterdir()] == ["student"]


def test_a_files_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert sha256_of(tmp_path / "abc") == known


def test_threads_that_open_at_once_share_one() -> None:
    """A stream that only one of two threads knew would be closed under it, and its number given to another file."""
    both = threading.Barrier(2)

    def opened() -> object:
        both.wait(timeout=10)
        return object()

    shared = PerProcess(opened)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: shared(), range(2))
    assert first is second is shared()


@pytest.mark.parametrize("exchanged", (True, False))
def test_a_folder_takes_the_place_of_another(
    exchanged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one step where the system can exchange names, else by way of a third name."""

    def cannot(one: Path, other: Path) -> None:
        raise OSError(22, "Invalid argument")

    if not exchanged:
        monkeypatch.setattr(files, "_exchange", cannot)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"of the {name}").touch()
    files.put_in_place(tmp_path / "new", tmp_path / "old")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "old",
        "old/of the new",
    ]


def test_a_full_disk_is_known_however_it_is_told() -> None:
    for error in (OSError(28, "No space left on device", "a/b"), ValueError("I/O error: none (os error 28)")):
        told = files.disk_error(error)
        assert told is not None and told.startswith("No space left on device: the disk could not be written")
    assert "written a/b;" in (files.disk_error(OSError(28, "No space", "a/b")) or "")
    assert files.disk_error(OSError(2, "No such file")) is None and files.disk_error(ValueError("28")) is None
