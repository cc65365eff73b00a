"""What the documents say exists: commands, keys, names and links."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="needs the checkout")
sys.path.insert(0, str(ROOT / "docs" / "generate"))
import commands  # noqa: E402
import repository_pages  # noqa: E402

from stepdistill.system.shipped import method_names  # noqa: E402

BLOCKS = [block for file in commands.documents() for block in commands.blocks(file)]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_the_tool_takes_every_command_of_the_documents(block: commands.Block) -> None:
    for command in block.commands:
        commands.check(command)


@pytest.mark.parametrize("file", commands.documents(), ids=lambda file: str(file.relative_to(ROOT)))
def test_the_tool_takes_every_command_of_a_sentence(file: Path) -> None:
    """Where a sentence names a command in short, what must be given may be left out."""
    for command in commands.inline(file):
        try:
            commands.check(command)
        except Exception as error:
            assert type(error).__name__ in ("MissingParameter", "NoArgsIsHelpError"), error


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if not block.mark], ids=lambda block: block.place
)
def test_a_command_without_a_mark_runs(
    block: commands.Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stepdistill.cli import app

    monkeypatch.chdir(tmp_path)
    for command in block.commands:
        assert command[0] in commands.RUN_AT_ONCE, (
            "say what it needs in the line before, see docs/generate/commands.py"
        )
        assert not app(list(command), standalone_mode=False)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train --methode dmd", "--methode"),
        ("train no_such_recipe", "no recipe"),
        ("train --set train.stepz=3", "train.stepz"),
        ("eval RUN --suite emojy", "no suite"),
        ("train --method dmdd", "no method"),
    ],
)
def test_a_wrong_command_would_be_noticed(command: str, said: str) -> None:
    with pytest.raises(Exception, match=said):
        commands.check(tuple(command.split()))


def test_marks_are_words_and_continued_lines_are_one_command(tmp_path: Path) -> None:
    launched = "A=1 accelerate launch -m stepdistill train \\\n  my.yaml  # c"
    text = f"*Needs a GPU.*\n\n```sh\n{launched}\n```\n\nx\n```sh\nls\n```\n"
    assert list(commands.commands("cd x && stepdistill ls methods")) == [("ls", "methods")]
    (tmp_path / "page.md").write_text(text)
    found = list(commands.blocks(tmp_path / "page.md", tmp_path))
    assert found == [commands.Block("page.md:3", "Needs a GPU", (("train", "my.yaml"),))]


def test_links_between_files_lead_somewhere() -> None:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    lost = []
    for name in listed.stdout.split():
        uri = repository_pages.uri_of(PurePosixPath(name))
        for path in repository_pages.links((ROOT / name).read_text("utf-8"), uri):
            if not (ROOT / path).exists():
                lost.append(f"{name}: {path}")
    assert not lost


@pytest.mark.parametrize(
    ("uri", "link", "page"),
    [
        ("guides/choose.md", "../../stepdistill/methods/dmd.py", "../methods/dmd.md"),
        ("start/first_student.md", "../first_student.ipynb", "notebook.md"),
        ("files/README.md", "docs/first_student.ipynb", "../start/notebook.md"),
        ("measure/own_suite.md", "../../stepdistill/evaluation/suite.py", "../reference/suite.md"),
        ("methods/dmd.md", "../../stepdistill/methods/dmd.py", "../files/stepdistill/methods/dmd.py.md"),
        ("guides/choose.md", "../../stepdistill/methods/_x.py", "../files/stepdistill/methods/_x.py.md"),
    ],
)
def test_a_link_to_what_a_page_is_generated_from_leads_to_the_page(uri: str, link: str, page: str) -> None:
    assert repository_pages.relinked(f"[x]({link})", uri) == f"[x]({page})"


def test_what_links_are_led_to_is_generated_and_what_they_name_is_here() -> None:
    import reference_pages

    methods = method_names()
    made = {*reference_pages.pages(), "methods/index.md", "start/notebook.md"}
    made |= {f"methods/{name}.md" for name in methods}
    for name in (*repository_pages.GENERATED, *(f"stepdistill/methods/{name}.py" for name in methods)):
        assert (ROOT / name).is_file()
        assert repository_pages.generated_from(PurePosixPath(name), "index.md") in made


GAP = re.compile(r"\b[01]\.\d{3}\b")


@pytest.mark.parametrize("name", ["README.md", "docs/guides/choose.md", "docs/start/first_student.md"])
def test_a_gap_that_a_document_quotes_is_of_a_shipped_result(name: str) -> None:
    """In the lines that name a method or a recipe; runs that are made again change their numbers."""
    files = (ROOT / "train" / "results").glob("*.json")
    known = {
        f"{gap:.3f}" for file in files for gap in json.loads(file.read_text("utf-8"))["gap_closed"].values()
    }
    lines = [
        line for line in (ROOT / name).read_text("utf-8").splitlines() if "|" in line or "gap closed" in line
    ]
    quoted = {number for line in lines for number in GAP.findall(line)}
    assert quoted and quoted <= known


def test_numbers_of_the_first_student_are_of_the_shipped_results() -> None:
    def shipped(name: str) -> dict[str, Any]:
        return json.loads((ROOT / "train" / "results" / f"{name}.json").read_text("utf-8"))

    page, front = ((ROOT / name).read_text("utf-8") for name in ("docs/start/first_student.md", "README.md"))
    first = shipped("dmd_emoji_quick")
    student, health = first["student"], first["health"]
    distance = f"{student['fd']['1']:.2f} ± {student['fd_se']['1']:.2f}"
    assert f"`FD {distance}`" in page and f"  {distance}  " in front
    assert f"`FD-judge {student['second_fd']['1']:.2f}`, `judge fit {student['second_fit']['1']:.1f}`" in page
    varied = f"healthy: diversity {health['diversity']:.2f} (teacher {health['teacher_diversity']:.2f}), saturation "
    assert varied in page and varied in front
    for name, steps in (("dmd_emoji", "1"), ("lcm_emoji", "4")):
        run = shipped(name)
        minutes, gap = run["train_seconds"] / 60, run["gap_closed"][steps]
        assert f"`stepdistill train {name}` ({minutes:.1f} minutes of training, gap closed {gap:.3f})" in page


def test_the_plans_of_the_front_page_are_those_of_their_table() -> None:
    def rows(name: str) -> dict[str, list[str]]:
        lines = (ROOT / name).read_text("utf-8").splitlines()
        cells = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")
        ]
        return {row[0]: row for row in cells}

    known, told = rows("docs/reference/plans.md"), rows("README.md")
    quoted = [row for name, row in told.items() if name in known]
    assert len(quoted) == 6
    for name, peak, card, disk, time in quoted:
        hours = float(known[name][8].removesuffix(" h").replace(",", ""))
        wanted = [f"{known[name][4]} GiB", known[name][6], f"{known[name][7]} GiB"]
        assert [peak, card, disk] == wanted, name
        assert float(time.removesuffix(" hours").replace(",", "")) == pytest.approx(hours, abs=0.5), name


def test_numbers_of_methods_come_from_the_shipped_results() -> None:
    import method_pages

    told = method_pages.facts()
    assert not [text for facts in told.values() for text in facts.values() if "{" in str(text)]
    known = {report["name"]: report for report in method_pages.reports()}
    assert f"(gap {known['lcm_emoji']['gap_closed']['1']:.3f}," in told["lcm"]["avoid"]
    with pytest.raises(ValueError, match="train/results has no 3 of lcm_emoji"):
        method_pages.filled("one step (gap {lcm_emoji 3})", method_pages.reports())


def test_every_method_has_said_what_it_is_for_and_what_not() -> None:
    import yaml

    told = yaml.safe_load((ROOT / "docs" / "generate" / "methods.yaml").read_text("utf-8"))
    assert {name: set(facts) for name, facts in told.items()} == {
        name: {"steps", "take", "avoid"} for name in method_names()
    }
