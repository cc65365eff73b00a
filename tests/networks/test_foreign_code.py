"""Code that lies in a folder of others is not run: it is refused by name, and runs only where diffusers is told to."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from tiny import tiny_pipeline

from stepdistill.errors import UserError
from stepdistill.networks.find import check_teacher
from stepdistill.networks.loading import load_folder, load_pipeline, load_teacher
from stepdistill.system.shipped import content_folder

CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
class Foreign{base}({base}): pass
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "pipeline"
    tiny_pipeline("unet-ddim").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "base, entry, file",
    [
        ("DDIMPipeline", "_class_name", "foreign_pipeline.py"),
        ("UNet2DModel", "unet", "unet/foreign_unet.py"),
        ("DDIMScheduler", "scheduler", "scheduler/foreign_scheduler.py"),
    ],
)
def test_code_that_an_index_names_is_refused_and_runs_with_the_flag_alone(
    saved: Path, tmp_path: Path, base: str, entry: str, file: str
) -> None:
    folder, marker = tmp_path / "p", tmp_path / "ran"
    shutil.copytree(saved, folder)
    (folder / file).write_text(CODE.format(marker=str(marker), base=base))
    index = json.loads((folder / "model_index.json").read_text())
    index[entry] = [Path(file).stem, f"Foreign{base}"]
    (folder / "model_index.json").write_text(json.dumps(index))
    for read in (check_teacher, load_pipeline, load_teacher, lambda name: load_folder(Path(name), "it")):
        with pytest.raises(UserError, match=rf"carries code of its own \({file}\), .*trust_remote_code=True"):
            read(str(folder))
    # Beside a file of ours, too, with which a folder is loaded as one with code.
    shutil.copy(content_folder("pipelines") / "given_steps.py", folder / "scheduler")
    with pytest.raises(UserError, match="carries code of its own"):
        load_pipeline(folder)
    assert not marker.exists()
    with contextlib.suppress(Exception):
        DiffusionPipeline.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
    assert marker.exists()  # the payload does what it is for


def test_code_that_a_config_names_is_not_run(saved: Path, tmp_path: Path) -> None:
    """Folders of well-known teachers have such files beside classes of the library's own: they are left alone."""
    folder, marker = tmp_path / "p", tmp_path / "ran"
    shutil.copytree(saved, folder)
    for place in (folder, folder / "unet", folder / "scheduler"):
        (place / "foreign.py").write_text(CODE.format(marker=str(marker), base="UNet2DModel"))
        (place / "pipeline.py").write_text(CODE.format(marker=str(marker), base="DDIMPipeline"))
    for name in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = {
            key: "foreign.ForeignUNet2DModel" for key in ("AutoModel", "AutoTokenizer", "AutoConfig")
        }
        content |= {"custom_pipeline": "pipeline", "trust_remote_code": True}
        (folder / name).write_text(json.dumps(content))
    assert type(load_pipeline(folder, "cpu")[0].unet).__name__ == "UNet2DModel"
    assert type(load_teacher(str(folder)).unet).__name__ == "UNet2DModel"
    index = json.loads((folder / "model_index.json").read_text())
    for library, kind in (("diffusers", "AutoModel"), ("transformers", "AutoModel"), ("antigravity", "fly")):
        (folder / "model_index.json").write_text(json.dumps({**index, "unet": [library, kind]}))
        with contextlib.suppress(UserError):
            load_pipeline(folder, "cpu")
    assert not marker.exists()
