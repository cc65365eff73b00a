"""A run ends as it began, whatever becomes of the package's files while it is under way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import stepdistill
from stepdistill.system.shipped import content_folder

METHOD = """
from pathlib import Path

import pytest

import stepdistill
from stepdistill import extend as sd


class Own(sd.Method):
    class Options(sd.MethodOptions):
        pass

    def sampler(self):
        return sd.Sampler(self.times, renoise=False)

    def loss(self, turn, batch):
        t = batch.draws.uniform("t")
        target = self.teacher.predict(batch.noise, t, batch.cond).x0
        return sd.Loss((self.student.predict(batch.noise, t, batch.cond).x0 - target).square().mean())

    def after_step(self, turn):
        for file in Path(stepdistill.__file__).parent.rglob("*.py*"):
            if "assets" not in file.parts:
                file.unlink()
"""


@pytest.mark.slow
def test_a_run_whose_package_is_taken_away_under_way_is_exported_and_measured(tmp_path: Path) -> None:
    """The method deletes every Python file of the copy of the package that it runs from."""
    package = tmp_path / "place" / "stepdistill"
    shutil.copytree(
        Path(stepdistill.__file__).parent,
        package,
        ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"),
    )
    for weights in Path(stepdistill.__file__).parent.rglob("*.safetensors"):
        (package / weights.relative_to(Path(stepdistill.__file__).parent)).symlink_to(weights)
    for name in ("train", "eval", "pipelines"):
        (package.parent / name).symlink_to(content_folder(name))
    (tmp_path / "own.py").write_text(METHOD)
    (tmp_path / "prompts.txt").write_text("red heart\nblue fish\n")
    program = (
        f"import sys; sys.path.insert(0, {str(package.parent)!r}); from stepdistill.cli import main; main()"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-c", program, "train", "--method", str(tmp_path / "own.py")),
            *("--teacher", "emoji", "--output", str(tmp_path / "run")),
            *(
                f"--set=data.prompts={tmp_path / 'prompts.txt'}",
                "--set=train.updates=2",
                "--set=train.batch=2",
            ),
            *("--set=train.preview_every=0", "--set=student.output=teacher", "--set=evaluate=false"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(package.rglob("*.py"))
    assert (tmp_path / "run" / "student" / "model_index.json").is_file()
    assert (tmp_path / "run" / "report.html").is_file()
