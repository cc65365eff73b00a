"""Strange inputs: what each piece that reads a file of others may be given, and how it is called with it.

A case is bytes and the numbers that change them; a piece either takes what it is given or raises a UserError.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import run_folders
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save as tensors_in_bytes

from stepdistill.training import warm_starts
from stepdistill.watching.script import SCRIPT


class Target(NamedTuple):
    """Strategy of its input, and a call that reads it from a folder of its own."""

    inputs: st.SearchStrategy[Any]
    read: Callable[[Path, Any], object]


WORDS = (
    "teacher method options terms student data train health export evaluate output prompts images lr updates steps "
    "times batch guidance files call seeds tolerance num_inference_steps scores suite n student.times nan .inf emoji "
    "dmd lcm precision size betas clip _class_name schema name mean covariance protocol update loss network"
).split()
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(WORDS), st.text(max_size=8),
    st.sampled_from([10**400, -1, 0, 1e308, "../../x", "/etc/passwd", "a" * 5000, "\0", "\ud800", "x.py", "~", ""]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(WORDS), st.text(max_size=4)), inner, max_size=4),
    ),
    max_leaves=8,
)
LAUGH = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)
TEXTS = st.sampled_from([
    LAUGH, "&a [*a]", "!!python/object/apply:os.system ['touch ran']", "a: 2026-13-45", "!!int x", "!!timestamp x",
    "a: 1\na: 2", "[" * 3000, "{" * 3000, "9" * 5000, "\ufeffmethod: dmd", "method: dmd\noptions: !!set {a, b}",
    "? [1, 2]\n: 3", "options: !!binary aGk=", "train: {lr: .nan}", "train: {updates: 1e999}", "<<: {method: dmd}", "",
    "method: dmd\n" + "\n".join(f"k{i}: 1" for i in range(500)), "--- a\n--- b", "%YAML 9.9\n---\na", "a: \t b",
])  # fmt: skip


def _dumped(value: Any) -> bytes:
    try:
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    except Exception:
        return repr(value).encode("utf-8", "replace")


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _changed(given: tuple[bytes, list[tuple[int, int, bytes]]]) -> bytes:
    """Bytes some of which are cut out, and others put in."""
    content = given[0]
    for start, cut, put in given[1]:
        at = start % (len(content) + 1)
        content = content[:at] + put + content[at + cut :]
    return content


def altered(valid: list[bytes]) -> st.SearchStrategy[bytes]:
    """Valid files, most of them damaged, and bytes of any kind."""
    change = st.tuples(
        st.integers(0, 1 << 20), st.sampled_from([0, 0, 1, 1, 4, 100, 1 << 20]), st.binary(max_size=8)
    )
    damaged = st.tuples(st.sampled_from(valid), st.lists(change, max_size=3)).map(_changed)
    return st.one_of(damaged, damaged, damaged, st.binary(max_size=200))


def _merged(base: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A table with some of its values replaced."""
    return st.dictionaries(st.sampled_from([*base, "more"]), VALUES, max_size=2).map(
        lambda new: {**base, **new}
    )


# --- valid files


def _image(kind: str, mode: str = "RGB", size: tuple[int, int] = (6, 5), **more: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **more)
    return file.getvalue()


def _animation() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("P", (4, 4), colour) for colour in (0, 9)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


BOMB = _image("PNG").replace(struct.pack(">II", 6, 5), struct.pack(">II", 60000, 60000))
"""A PNG that claims ten gigabytes (its checksum is not that of the claim)."""
IMAGES = [
    _image("PNG"), _image("JPEG"), _image("WEBP"), _image("BMP"), _image("TIFF"), _image("GIF", "P"), _image("PPM"),
    _image("PNG", "I;16"), _image("PNG", "RGBA"), _image("JPEG", "CMYK"), _image("TIFF", "F"), _animation(), BOMB,
]  # fmt: skip


def _npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def _npy(shape: str, data: bytes = b"") -> bytes:
    """A .npy whose head claims a shape."""
    head = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + data


def _zip(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def _tar(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, to in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, to
            archive.addfile(member)
    return file.getvalue()


class Payload:
    """Makes a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return (open, ("ran", "w"))


def payload() -> bytes:
    """A pickle that makes the file ``ran``."""
    return pickle.dumps({"mu": Payload(), "sigma": np.eye(3)})


def laughing_pickle() -> bytes:
    """A pickle of a list of lists of lists, which stands for 9**30 values."""
    inner: Any = [1]
    for _ in range(30):
        inner = [inner] * 9
    return pickle.dumps({"mu": inner, "sigma": 1})


STATISTICS = tensors_in_bytes(
    {"mean": torch.zeros(3, dtype=torch.float64), "covariance": torch.eye(3, dtype=torch.float64)},
    {"protocol": json.dumps({"n": 10})},
)
SHARD = tensors_in_bytes(
    {"x": torch.arange(12.0).reshape(4, 3), "crc32 of x": torch.zeros(4, dtype=torch.int64)},
    {"about": json.dumps({"sha256": "", "prompts": None, "best": [], "worst": []})},
)


def _header(text: str, length: int | None = None, data: bytes = b"\0" * 16) -> bytes:
    """A safetensors file with a header of one's own, which may claim another length."""
    return struct.pack("<Q", len(text) if length is None else length) + text.encode() + data


def _entry(dtype: str, shape: str, begin: int, end: int) -> str:
    return f'{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}}}'


TENSORS = [
    STATISTICS, SHARD, _header("{}", 1 << 62), _header("{}", (1 << 64) - 1), _header("[" * 3000), _header("{}"),
    _header(_entry("F32", "[4]", 0, 16)), _header(_entry("F32", "[4]", 0, 1 << 60)), _header("[]"), _header("null"),
    _header(_entry("F32", "[4]", 16, 0)), _header(_entry("F4", "[4]", 0, 2)), _header(_entry("I8", "[16]", 0, 16)),
    _header(_entry("F32", f"[{1 << 62}, {1 << 62}]", 0, 16)), _header(_entry("BOOL", "[16]", 0, 16)),
    _header(_entry("F8_E8M0", "[16]", 0, 16)), _header(_entry("C64", "[2]", 0, 16)),
    _header('{"__metadata__":{"about":"[]"}}'),
]  # fmt: skip


def _state_dict() -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, file)
    return file.getvalue()


# --- how each is read


def _written(folder: Path, name: str, content: bytes) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def read_recipe(folder: Path, content: bytes) -> None:
    """As ``train --dry-run`` does before anything is loaded."""
    from stepdistill.recipes.recipe import load_recipe

    _checked(load_recipe(_written(folder, "recipe.yaml", content)))


def read_sets(folder: Path, sets: list[str]) -> None:
    """The same of assignments."""
    from stepdistill.recipes.recipe import load_recipe

    _checked(load_recipe(None, sets=sets))


def _checked(recipe: Any) -> None:
    from stepdistill.training.identity import resolve, resolved_yaml
    from stepdistill.training.preflight import check_recipe

    check_recipe(recipe)
    resolved_yaml(resolve(recipe))


def read_prompt_file(folder: Path, given: tuple[str, bytes]) -> None:
    """Prompts, and rich captions, of a file of any ending."""
    from stepdistill.data.prompts import open_prompts, read_rich
    from stepdistill.errors import UserError

    file = _written(folder, f"prompts{given[0]}", given[1])
    try:
        list(open_prompts(file))
    except UserError:
        read_rich(file)


def read_captions(folder: Path, given: tuple[str, bytes]) -> None:
    """metadata of a folder of images."""
    from stepdistill.data.captions import read_metadata

    _written(folder, f"images/metadata{given[0]}", given[1])
    read_metadata(folder / "images")


def read_images(folder: Path, given: tuple[str, bytes]) -> None:
    """A folder of one image, or an archive."""
    from stepdistill.data.image_archives import ARCHIVES, open_images

    name, content = given
    place = _written(folder, f"images/a{name}", content)
    source = open_images(place if name in ARCHIVES else place.parent, resolution=8, workers=0)
    list(source)
    source.account(), source.remarks()


def read_tensor_file(folder: Path, given: tuple[str, bytes]) -> None:
    """Weights of one's own, and all kinds of shards."""
    from stepdistill.data.shards import Shards
    from stepdistill.errors import UserError
    from stepdistill.evaluation.gallery import load_gallery
    from stepdistill.evaluation.shards import _read
    from stepdistill.system.tensor_files import read_tensors

    file = _written(folder, f"pairs-00000{given[0]}", given[1])
    for read in (
        lambda: read_tensors(file, "weights"),
        lambda: load_gallery(file),
        lambda: _read(file),
        lambda: Shards(folder, "pairs").missing([0]),
        lambda: Shards(folder, "pairs").rows(0, "x", [0]),
    ):
        try:
            read()
        except UserError:
            continue
        except KeyError as error:
            if error.args != ("x",):  # of a name that the file does not have
                raise


def read_checkpoint(folder: Path, given: tuple[bytes, bytes]) -> None:
    """A checkpoint: state.json and a file of tensors."""
    from stepdistill.training.checkpoint import load_checkpoint

    _written(folder, "state.json", given[0])
    _written(folder, "student.safetensors", given[1])
    load_checkpoint(folder)


def read_reference_file(folder: Path, given: tuple[str, bytes]) -> None:
    """Statistics of real images."""
    from stepdistill.evaluation.reference_files import read_reference

    read_reference(_written(folder, f"reference{given[0]}", given[1]))


def read_suite(folder: Path, content: bytes) -> None:
    """A suite."""
    from stepdistill.evaluation.suite import load_suite

    load_suite(_written(folder, "suite.yaml", content))


def read_student(folder: Path, given: tuple[bytes, bytes, bytes]) -> None:
    """A student's folder, as sample, eval and verify look at it before they load it."""
    from stepdistill.errors import UserError
    from stepdistill.export.verify import check_unaltered
    from stepdistill.networks.find import check_teacher, find_pipeline
    from stepdistill.networks.own_call import own_call

    _written(folder, "student/verification/manifest.json", given[0])
    _written(folder, "student/model_index.json", given[1])
    _written(folder, "student/unet/diffusion_pytorch_model.safetensors", given[2])
    place = folder / "student"
    calls: list[Callable[[], object]] = [
        lambda: check_unaltered(place),
        lambda: own_call(place),
        lambda: find_pipeline(place),
        lambda: check_teacher(str(place)),
    ]
    for call in calls:
        try:
            call()
        except UserError:
            continue


def read_run_folder(folder: Path, given: dict[str, bytes]) -> None:
    """A run's folder, as doctor, compare and watch read it."""
    from stepdistill.cli.doctor_run import examine_run
    from stepdistill.comparison.collect import collect
    from stepdistill.errors import UserError
    from stepdistill.training.run_record import read_run

    _written(folder, "recipe.yaml", b"method: dmd\n")
    for name, content in given.items():
        _written(folder, name, content)
    for call in (
        lambda: examine_run(folder),
        lambda: collect([str(folder)], ""),
        lambda: _told(read_run(folder)),
    ):
        try:
            call()
        except UserError:
            continue


def _told(record: Any) -> None:
    _ = record.state, record.about_state, record.name, record.going, record.samples(), record.previews(3)


POISON = [
    "<script>X9z()</script>", '"><img src=x onerror=X9z()>', "' onmouseover='X9z()", "javascript:X9z()", "\ud800",
    "</svg><script>X9z()", "</title><script>X9z()</script>", "</style><script>X9z()</script>", "\0", "\x1b[2J", "", " ",
    "--><script>X9z()</script><!--", "a\nb\r\nX-Evil: X9z", "&lt;script&gt;", "$(touch ran)`touch ran`", "\u202e",
    "data:text/html,<script>X9z()</script>", "../../x", "https://example.org/X9z", "%s{0}{x}", "$\\frac{X9z",
    "*|_[a](b)", "x" * 5000,
]  # fmt: skip
ODD = [
    None,
    True,
    -1,
    0,
    1e308,
    -1e308,
    1e299,
    float("nan"),
    float("inf"),
    10**18,
    10**300,
    "x",
    [],
    {},
    [[1]],
    {"X9z": 1},
]


def poisoned(value: Any, chance: random.Random, often: float = 0.3) -> Any:
    """A table with some of its texts in the place of markup, and rarely with values and keys of another kind."""
    if chance.random() < often / 30:
        return chance.choice(ODD)
    if isinstance(value, dict):
        return {
            chance.choice(POISON) if chance.random() < often / 30 else key: poisoned(inner, chance, often)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [poisoned(inner, chance, often) for inner in value]
    if isinstance(value, str):
        return chance.choice(POISON) if chance.random() < often else value
    return chance.choice(ODD) if chance.random() < often / 10 else value


class _Harmless(HTMLParser):
    """Stops at what a page of ours has not: scripts, handlers, and addresses of elsewhere."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("iframe", "object", "embed", "base", "form", "script"), tag
        for name, value in attrs:
            assert not name.startswith("on") and "X9z" not in name, (tag, name)
            if name in ("href", "src", "action", "formaction", "srcdoc"):
                plain = ":" not in (value or "") or value == "data:,"
                assert plain or (value or "").startswith("data:image/"), value


def harmless(page: str) -> None:
    """Asserts that nothing of others stands in a page as markup."""
    parser = _Harmless()
    parser.feed(page)
    parser.close()


def _poisoned_run(folder: Path, chance: random.Random) -> None:
    """A run's folder, whose files are each in their place, odd, or not there."""
    _written(
        folder,
        "recipe.yaml",
        _dumped(poisoned({"teacher": "emoji", "method": "dmd", "options": {"a": "b"}}, chance)),
    )
    lines = [_json(poisoned(row, chance, 0.1)) for row in run_folders.rows()]
    if chance.random() < 0.2:
        lines[chance.randrange(len(lines))] = chance.choice(
            [b"{", b"\xff", b"[1]", b"", b"null", b'{"update": 3}']
        )
    report = {**run_folders.REPORT, "name": "a", "health": {**run_folders.REPORT["health"]}}
    files = {
        "stats.jsonl": b"\n".join(lines) + b"\n",
        "status.json": _json(poisoned(STATUS, chance, 0.1)),
        "report.json": _json(poisoned(report, chance, 0.2)),
    }
    about = {"rows": [["teacher", 2], ["student", 2]], "size": [8, 8], "prompts": ["a", "b"]}
    notes, file = PngInfo(), io.BytesIO()
    text = json.dumps(poisoned(about, chance, 0.3))
    notes.add_itxt("stepdistill rows", text)
    Image.new("RGB", (22, 54)).save(file, "PNG", pnginfo=notes)
    files |= dict.fromkeys(
        ("pictures/samples.png", "pictures/000004.png", "pictures/000008.png"), file.getvalue()
    )
    for name, content in files.items():
        if chance.random() < 0.8:
            _written(folder, name, content)


@contextlib.contextmanager
def _few_curves(chance: random.Random) -> Iterator[None]:
    """Draws the curves in one case of ten: they take nearly all of a page's time."""
    from stepdistill.pages import plots

    drawn = plots._svg
    if chance.random() < 0.9:
        plots._svg = lambda *arguments: 'viewBox="0 0 1 1">'
    try:
        yield
    finally:
        plots._svg = drawn


def read_run_pages(folder: Path, number: int) -> None:
    """A run's page as watch and report.html have it, and the list of runs."""
    from stepdistill.training.run_page import run_page
    from stepdistill.training.run_record import read_run
    from stepdistill.watching.site import Site

    chance = random.Random(number)
    _poisoned_run(folder / "run", chance)
    with _few_curves(chance):
        harmless(run_page(read_run(folder / "run")))
        for root, path in ((folder, "/"), (folder, "/run/?body"), (folder / "run", "/")):
            answer = Site(root).answer(path)
            assert all(value.isprintable() and value.isascii() for value in answer.headers.values())
            harmless(
                answer.text.encode("utf-8", "replace").decode().replace(f"<script>{SCRIPT}</script>", "")
            )


def read_compare_pages(folder: Path, number: int) -> None:
    """Two runs and an evaluation side by side."""
    from stepdistill.comparison.collect import collect
    from stepdistill.comparison.page import as_json, html_page
    from stepdistill.comparison.table import text_tables

    chance = random.Random(number)
    for name in ("one", "two"):
        _poisoned_run(folder / name, chance)
    scores = {"1": {"fd": 2.0, "kid": 0.5}, "2": {"fd": 1.0, "kid": None}}
    own = {
        key: run_folders.REPORT[key] for key in ("suite", "n", "metrics", "protocol", "hardware", "against")
    }
    _written(folder, "eval.json", _json(poisoned({**own, "pipeline": "x", "scores": scores}, chance, 0.1)))
    places = [
        str(folder / name) for name in ("one", "two", "eval.json") if chance.random() < 0.8 or name == "one"
    ]
    compared = collect(places, chance.choice(POISON))
    with _few_curves(chance):
        harmless(html_page(replace(compared, failed={chance.choice(POISON): chance.choice(POISON)})))
    json.dumps(as_json(compared))
    assert all(line.isprintable() for line in text_tables(compared.groups).split("\n"))


@cache
def warm_run() -> tuple[Any, dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """A run that could have a warm start, and what one of it would be."""
    from accelerate import Accelerator
    from tiny import tiny_pipeline

    from stepdistill.recipes.recipe import load_recipe
    from stepdistill.training.assemble import assemble
    from stepdistill.training.identity import resolve
    from stepdistill.training.run import Run

    sets = [
        "student.output=teacher",
        "train.updates=4",
        "train.batch=2",
        "train.average=0.5",
        "evaluate=false",
    ]
    recipe = load_recipe(Path(__file__).parent / "empty.yaml", method="dmd", sets=sets)
    job = assemble(resolve(recipe), Accelerator(cpu=True), tiny_pipeline("dit"))
    run = Run(job.objective, recipe, Path())
    for group in run.optimizers["student"].param_groups:
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    run.optimizers["student"].step()
    row = {"network": "student", "loss": 1.0, "seconds": 1.0, "worries": ["a"]}
    rows = [{"update": i, **row} for i in range(3)]
    passes = {"student": {"with_graph": 6, "without_graph": 0}}
    tensors = {
        name: {k: v.clone() for k, v in group.items()}
        for name, group in warm_starts.WarmStart(run, 3, Path())._tensors().items()
    }
    return run, tensors, {"seconds": 1.0, "passes": passes, "made_by": "another", "rows": rows}


def read_warm_start(folder: Path, number: int) -> None:
    """A kept warm start that another has made, its hashes in order or not."""
    from safetensors.torch import save

    from stepdistill.training.checkpoint import OWN_HASH, _hash_of

    run, tensors, state = warm_run()
    chance = random.Random(number)
    if chance.random() < 0.7:
        state = poisoned(state, chance, 0.15)
    files = {}
    for group, own in tensors.items():
        own = dict(own)
        if own and chance.random() < 0.3:
            name = chance.choice(sorted(own))
            other: list[torch.Tensor | None] = [
                None,
                own[name].reshape(-1)[:0],
                own[name][None],
                own[name].to(torch.int8),
            ]
            other += [
                torch.full_like(own[name], float("nan")) if own[name].is_floating_point() else -own[name]
            ]
            changed = chance.choice(other)
            own.pop(name) if changed is None else own.update({name: changed})
        if chance.random() < 0.1:
            own[chance.choice(["x", "0.x", "99999.step", "a.b", "-1.step"])] = torch.zeros(2)
        if chance.random() < 0.95:
            files[f"{group}.safetensors"] = save(own) if chance.random() < 0.95 else chance.choice(TENSORS)
    if chance.random() < 0.1:
        files[chance.choice(["x.safetensors", "roles.safetensors", "student-00001-of-00002.safetensors"])] = (
            TENSORS[1]
        )
    place = folder / "kept" / "step-00000003"
    for name, content in files.items():
        _written(place, name, content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    told = {**state, "step": 3, "files": hashes} if isinstance(state, dict) else state
    if isinstance(told, dict) and chance.random() < 0.9:
        told = json.loads(json.dumps(told))
        told[OWN_HASH] = _hash_of(told)
    _written(place, "state.json", _json(told))
    kept, warm_starts.STATS = warm_starts.STATS, os.devnull
    try:
        warm_starts.WarmStart(run, 3, folder / "kept").take_over()
    finally:
        warm_starts.STATS = kept
    run.optimizers["student"].step()


MANIFEST = {
    "files": {"model_index.json": "0" * 64},
    "tolerance": {"max": 1, "mean": 0.1},
    "seeds": [0],
    "call": {"num_inference_steps": 1},
    "step_counts": [1],
}
INDEX = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
STATE = {"step": 1, "files": {"student.safetensors": "0" * 64}}
REPORT = {
    "name": "a",
    "suite": "emoji@1",
    "n": 3,
    "student": {"fid": {"1": 2.0}},
    "verification": "",
    "train_seconds": 1.0,
    "wall_seconds": 1.0,
    "peak_memory_bytes": 1,
}
ROW = {"update": 0, "network": "student", "loss": 1.0, "seconds": 1.0, "grad_norm": 1.0}
STATUS = {
    "state": "training",
    "phase": "training",
    "update": 1,
    "updates": 2,
    "eta_seconds": 1.0,
    "health": None,
    "pid": 1,
    "host": "a",
    "written": "2026-01-01T00:00:00+00:00",
}
PROMPTS = [
    b"a\nb\n",
    b'{"prompt": "a"}\n',
    b'["a", {"text": "b"}]',
    b"prompt,rich\na,b\n",
    b"\xef\xbb\xbfa",
    b"a\0b\n\xff",
    b"[" * 9000,
    b"9" * 5000,
    b'"' + b"x" * 200_000,
    b'{"prompt": "a", "rich": "b"}',
    b'prompt\n"a\n',
    b"{}",
    b"3",
]
TARS = [
    _tar({"0.png": IMAGES[0], "0.txt": b"a"}),
    _tar({"../../x.png": IMAGES[0], "/abs.txt": b"a"}),
    _tar({"0.txt": b"a"}, {"1.txt": "/etc/passwd", "1.png": "/etc/passwd"}),
]
ZIPS = [_zip({"a.png": IMAGES[0]}), _zip({"../../x.png": IMAGES[0]}), _zip({"a.png": b"\0" * (1 << 22)})]
NPZS = [
    _npz(mu=np.zeros(3), sigma=np.eye(3)),
    _npz(mu=np.array([{}], object), sigma=1),
    _npz(arr_0=np.zeros((2, 4, 4, 3), np.uint8)),
    _zip({"mu.npy": _npy("(3,)", b"\0" * 24), "sigma.npy": _npy("(1000000, 1000000)")}),
    _npz(mu=np.zeros(0), sigma=np.zeros((0, 0))),
    _zip({"mu.npy": _npy("[3]"), "sigma.npy": _npy("(-1,)")}),
    _npz(mu=np.zeros(3) + np.nan, sigma=np.eye(3)),
    _npz(),
]
PICKLES = [
    pickle.dumps({"mu": np.zeros(3), "sigma": np.eye(3)}),
    payload(),
    laughing_pickle(),
    b"\x80\x04r\xff\xff\xff\x0f.",
    pickle.dumps([1]),
    pickle.dumps({"fid": {"mu": 1, "sigma": "x"}}),
]


def named(*pairs: tuple[list[str], list[bytes]]) -> st.SearchStrategy[tuple[str, bytes]]:
    """Endings and contents of files."""
    return st.one_of([st.tuples(st.sampled_from(ends), altered(valid)) for ends, valid in pairs])


TARGETS: dict[str, Target] = {
    "recipes": Target(
        st.one_of(
            TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")),
            VALUES.map(_dumped),
            altered([b"method: dmd\ntrain: {updates: 3}\n"]),
            _merged(
                {
                    "teacher": "emoji",
                    "method": "dmd",
                    "train": {"updates": 3},
                    "student": {"steps": 1},
                    "options": {},
                }
            ).map(_dumped),
        ),
        read_recipe,
    ),
    "assignments": Target(
        st.lists(
            st.tuples(
                st.sampled_from(
                    [
                        *WORDS,
                        "train.lr",
                        "train.updates",
                        "student.times",
                        "data.prompts",
                        "data.images",
                        "options.guidance",
                        "teachers.a",
                        "data.route.a",
                        "terms.reward",
                        "export.what",
                        "evaluate",
                        "family",
                        "data.size",
                    ]
                ),
                st.one_of(VALUES.map(str), TEXTS),
            ).map("=".join),
            min_size=1,
            max_size=3,
        ),
        read_sets,
    ),
    "prompt files": Target(
        named(([".txt", ".jsonl", ".json", ".csv", ".tsv"], PROMPTS), ([".tar", ".tar.gz"], TARS)),
        read_prompt_file,
    ),
    "captions": Target(
        named(
            (
                [".jsonl", ".csv"],
                [b'{"file_name": "a.png", "text": "b"}\n', b"file_name,text\n../a,b\n", *PROMPTS],
            )
        ),
        read_captions,
    ),
    "images": Target(
        named(
            ([".png", ".jpg", ".webp", ".gif", ".tiff"], IMAGES),
            ([".zip"], ZIPS),
            ([".tar", ".tgz"], TARS),
            ([".npz"], NPZS),
        ),
        read_images,
    ),
    "tensor files": Target(
        named(
            ([".safetensors"], TENSORS), ([".bin", ".pt", ".ckpt"], [_state_dict(), payload(), PICKLES[0]])
        ),
        read_tensor_file,
    ),
    "checkpoints": Target(
        st.tuples(st.one_of(_merged(STATE).map(_json), altered([_json(STATE)])), altered(TENSORS)),
        read_checkpoint,
    ),
    "reference files": Target(
        named(([".safetensors"], TENSORS), ([".npz"], NPZS), ([".pkl"], PICKLES)), read_reference_file
    ),
    "suites": Target(
        st.one_of(
            _merged(
                {"name": "a", "version": 1, "n": 0, "resolution": 0, "reference": "", "teacher_steps": 1}
            ).map(_dumped),
            TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")),
            VALUES.map(_dumped),
        ),
        read_suite,
    ),
    "student folders": Target(
        st.tuples(
            st.one_of(_merged(MANIFEST).map(_json), altered([_json(MANIFEST)])),
            st.one_of(_merged(INDEX).map(_json), altered([_json(INDEX)])),
            altered(TENSORS),
        ),
        read_student,
    ),
    "run folders": Target(
        st.fixed_dictionaries(
            {},
            optional={
                "report.json": st.one_of(_merged(REPORT).map(_json), altered([_json(REPORT)])),
                "stats.jsonl": st.one_of(
                    _merged(ROW).map(lambda row: _json(row) + b"\n"), altered([_json(ROW) + b"\n"])
                ),
                "status.json": st.one_of(_merged(STATUS).map(_json), altered([_json(STATUS)])),
                "work/checkpoints/step-00000001/state.json": altered([_json(STATE)]),
                "samples.png": altered(IMAGES),
            },
        ),
        read_run_folder,
    ),
    "run pages": Target(st.integers(0, 1 << 40), read_run_pages),
    "compare pages": Target(st.integers(0, 1 << 40), read_compare_pages),
    "warm starts": Target(st.integers(0, 1 << 40), read_warm_start),
}
