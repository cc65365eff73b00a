"""What would be pushed is the verified student with a card for the Hub; what should not be public is refused before."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from stepdistill.cli.share import push
from stepdistill.errors import UserError
from stepdistill.export.verify import check_unaltered
from stepdistill.networks.pipeline_files import ADAPTER
from stepdistill.sharing.hub import exported, listing, prepare, write
from stepdistill.sharing.hub_card import local_paths, parted
from stepdistill.sharing.upload import check_repo, check_token
from stepdistill.system.packages import check_installed

CARD = "README.md"
MANIFEST = "verification/manifest.json"


def test_the_folder_is_the_student_and_its_card_says_what_the_hub_asks(run: Path, tmp_path: Path) -> None:
    student = run / "student"
    planned = prepare(student, "me/tiny-dmd")
    assert planned.warnings == ()
    assert set(planned.files) == {
        f.relative_to(student).as_posix() for f in student.rglob("*") if f.is_file()
    }
    assert f"{len(planned.files)} files for me/tiny-dmd" in listing(planned)
    written = write(planned, tmp_path / "hub")
    check_unaltered(written)
    data, text = parted((written / CARD).read_text())
    assert data["base_model"] == "someone/tiny-sd" and data["base_model_relation"] == "finetune"
    assert (data["license"], data["pipeline_tag"], data["library_name"]) == (
        "openrail++",
        "text-to-image",
        "diffusers",
    )
    assert {"diffusers", "text-to-image", "stepdistill", "dmd", "few-step"} <= set(data["tags"])
    prompts = json.loads((written / MANIFEST).read_text())["call"]["prompt"]
    shown = [(each["text"], each["output"]["url"]) for each in data["widget"]]
    assert shown == [(prompt, f"verification/{i}.png") for i, prompt in enumerate(prompts)]
    assert 'from_pretrained("me/tiny-dmd"' in text and "path/to/this/folder" not in text
    write(planned, tmp_path / "hub")  # an earlier one is replaced
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="no folder of an earlier push: give another --output"):
        write(planned, other)
    assert (other / "thesis.txt").is_file()


def test_a_licence_is_the_teachers_or_the_one_given_and_a_warning_otherwise(run: Path) -> None:
    card = run / "student" / CARD
    card.write_text(
        card.read_text().replace("license: openrail++\n", "").replace("base_model: someone/tiny-sd\n", "")
    )
    planned = prepare(run / "student", "me/x")
    assert [line.partition(":")[0] for line in planned.warnings] == [
        "no licence of the teacher is known, so the card states none",
        "the card names no base model",
    ]
    given = prepare(run / "student", "me/x", base_model="a/b", licence="mit")
    content = given.files[CARD]
    assert isinstance(content, bytes) and given.warnings == ()
    data, _ = parted(content.decode())
    assert (data["license"], data["base_model"]) == ("mit", "a/b")


def test_a_student_that_changed_since_it_was_verified_is_refused(run: Path) -> None:
    file = run / "student" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(content)
    with pytest.raises(UserError, match="was altered since export"):
        prepare(run / "student", "me/x")


def test_a_path_of_this_disk_is_refused_wherever_it_stands(run: Path) -> None:
    card = run / "student" / CARD
    plain = card.read_text()
    card.write_text(plain.replace("train dmd", "train dmd --output /home/me/runs/x"))
    with pytest.raises(UserError, match=r"README\.md names /home/me/runs/x, a path of this disk: edit it"):
        prepare(run / "student", "me/x")
    card.write_text(plain)
    index = run / "student" / "model_index.json"
    index.write_text(index.read_text().replace("{", '{"_name_or_path": "/data/sdxl/tuned", ', 1))
    manifest = run / "student" / MANIFEST
    content = json.loads(manifest.read_text())
    content["files"]["model_index.json"] = hashlib.sha256(index.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"model_index\.json names /data/sdxl/tuned.*export the student again"
    ):
        prepare(run / "student", "me/x")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("saved in /home/me/x.yaml.", ["/home/me/x.yaml."]),
        ("--output ~/runs/a", ["~/runs/a"]),
        (r"C:\Users\me\x", [r"C:\Users\me\x"]),
        ("https://example.org/a/b, 1/255, and/or/both, path/to/this, </a>, a :// b", []),
    ],
)
def test_paths_are_told_from_addresses_and_fractions(text: str, found: list[str]) -> None:
    assert local_paths("README.md", text) == found
    assert local_paths("tokenizer/tokenizer.json", json.dumps({"/home/me/x": 1})) == []


def test_an_adapter_says_whose_it_is_and_cannot_be_without_its_teacher(run: Path) -> None:
    student = run / "student"
    (student / ADAPTER).write_text(
        json.dumps({"teacher": "tuned", "teacher_sha256": "0", "pipeline": "StableDiffusionPipeline"})
    )
    (student / "model_index.json").unlink()
    manifest = student / MANIFEST
    content = json.loads(manifest.read_text())
    del content["files"]["model_index.json"]
    content["files"][ADAPTER] = hashlib.sha256((student / ADAPTER).read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))
    (student / CARD).write_text((student / CARD).read_text() + 'from_pretrained("path/to/tuned")\n')
    with pytest.raises(UserError, match="an adapter for tuned, which nobody else finds: give --base-model"):
        prepare(student, "me/x")
    planned = prepare(student, "me/x", base_model="them/sdxl")
    text, of, proof = (planned.files[name] for name in (CARD, ADAPTER, MANIFEST))
    assert isinstance(text, bytes) and isinstance(of, bytes) and isinstance(proof, bytes)
    data = yaml.safe_load(text.decode().split("---")[1])
    assert (data["base_model"], data["base_model_relation"]) == ("them/sdxl", "adapter")
    assert b'from_pretrained("them/sdxl")' in text and json.loads(of)["teacher"] == "them/sdxl"
    assert json.loads(proof)["files"][ADAPTER] == hashlib.sha256(of).hexdigest()
    with exported(student, "adapter") as folder:
        assert folder == student
    (run / "recipe.yaml").unlink()
    (student / "pytorch_lora_weights.safetensors").write_bytes(b"")
    with (
        pytest.raises(UserError, match="no run folder, from which the merged alone"),
        exported(student, "merged"),
    ):
        pass


def test_the_verb_says_at_once_what_it_cannot_do(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push(run, "me/tiny", dry_run=True)
    assert f"files for me/tiny\nnot pushed: {run / 'hub'}\n" in capsys.readouterr().out
    assert (run / "hub" / CARD).is_file()
    push(run, "me/tiny", private=True, dry_run=True)
    assert f"\nnot pushed, to a private repository: {run / 'hub'}\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="--output is for --dry-run"):
        push(run, "me/tiny", output=run / "other")
    with pytest.raises(UserError, match="--base-model is x, and must be OWNER/NAME"):
        push(run, "me/tiny", base_model="x", dry_run=True)
    with pytest.raises(UserError, match=r'no_such is not installed: pip install "stepdistill\[demo\]"'):
        check_installed("demo", "json", "no_such")


@pytest.mark.parametrize("name", ["mine", "a/b/c", "a/b c", "a/-b", "a/" + 97 * "x"])
def test_a_name_that_the_hub_does_not_take_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"--repo is .* and must be OWNER/NAME"):
        check_repo(name)
    check_repo("me/my-student.v1")


def test_without_a_token_nothing_is_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no token of the Hugging Face Hub was found: run `hf auth login`"):
        check_token()
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    check_token()
