"""The wheel holds what the repository holds, and works where the repository is not."""

from __future__ import annotations

import configparser
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONTENT = ("docs", "train", "eval", "pipelines")
NOT_SHIPPED = {"__pycache__", ".mypy_cache", ".ruff_cache"}

pytestmark = pytest.mark.skipif(not (ROOT / "setup.cfg").is_file(), reason="needs the checkout")


def files_of(folder: Path) -> list[Path]:
    """Files a checkout of this folder has, without what tools leave there."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not NOT_SHIPPED & set(path.parts) and not path.name.startswith(".")
    )


def settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg")
    return parser


def test_every_package_folder_is_listed() -> None:
    listed = set(settings()["options"]["packages"].split())
    folders = {path.parent for path in files_of(ROOT / "stepdistill") if path.suffix == ".py"}
    dotted = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert listed == dotted | {f"stepdistill._content.{name}" for name in CONTENT}


def test_content_folders_are_no_packages() -> None:
    for name in CONTENT:
        assert not list((ROOT / name).rglob("__init__.py"))


def test_the_test_extra_holds_the_eval_extra() -> None:
    extras = {name: set(text.split("\n")) for name, text in settings()["options.extras_require"].items()}
    assert extras["eval"] <= extras["test"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: an old build/ folder would get into it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("stepdistill", *CONTENT):
        shutil.copytree(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist")]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    return next((source / "dist").glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_every_file_and_no_other(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {str(path.relative_to(ROOT)) for path in files_of(ROOT / "stepdistill")}
    for folder in CONTENT:
        expected |= {f"stepdistill/_content/{path.relative_to(ROOT)}" for path in files_of(ROOT / folder)}
    assert names == expected
    assert not [name for name in names if "__pycache__" in name]


@pytest.mark.slow
def test_the_installed_command_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    bin_folder = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    python = str(bin_folder / "python")
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run(
        [python, "-c", query], capture_output=True, text=True, check=True
    ).stdout.strip()
    # The dependencies of this environment are lent by a path file, which does not follow its editable installations.
    lent = dict.fromkeys(
        [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    )
    (Path(packages) / "dependencies.pth").write_text("\n".join(lent) + "\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*pip, str(wheel)], check=True, env=environment)

    def run(*command: str) -> str:
        place = tmp_path / "outside"
        place.mkdir(exist_ok=True)
        answer = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, check=True
        )
        return answer.stdout

    home = (
        "from stepdistill.system.shipped import content_folder as f; "
        "print(*(f(n) for n in ('train', 'eval', 'pipelines')))"
    )
    for folder in run(python, "-c", home).split():
        assert Path(folder).is_relative_to(Path(packages) / "stepdistill" / "_content")
    command = str(bin_folder / "stepdistill")
    assert "doctor" in run(command, "--help")
    listed = run(command, "ls")
    for path in [*(ROOT / "train" / "recipes").glob("*.yaml"), *(ROOT / "eval" / "suites").glob("*.yaml")]:
        assert f"  {path.stem} " in listed
    assert "StableDiffusionPipeline" in listed
