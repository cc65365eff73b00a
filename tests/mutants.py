"""Changes the package's code, one small change at a time, and prints the changes that no test notices.

    python tests/mutants.py                                   # every file of GUARDS
    python tests/mutants.py stepdistill/methods/dmd.py        # one file
    python tests/mutants.py stepdistill/methods/dmd.py --lines 70-90
    python tests/mutants.py --jobs 2                          # two files at a time

The tests that guard a file are collected once; for each change (a mutant) they run in a fork of that process, those
that killed a mutant before and the quick ones first, with the changed code grafted into the functions in use. A mutant
is killed when a test fails or three times the tests' own processor time runs out; the command fails when one survives
that EXCEPTIONS does not explain. Left as they are: defaults of options, which a test would only say twice, the default
times, which tests/methods/test_contract.py has for all methods, floors of 1e-4 and less, the strictness of zip, whether
a continuous draw may meet its bound, and how large a block is that is computed at once. Trainings (LONG)
are left out: they take long to notice little.

Why not a library: mutmut 3 changes nothing in decorated functions or class bodies (properties, class methods,
``@torch.no_grad()``), has no mutants that drop a term, a statement or a stopped gradient, and takes no others;
cosmic-ray takes them as installed plugins, and starts a process for each mutant, most of which is the import of torch.
Here a mutant is a fork of one process that has imported torch and collected the tests.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, TextIO

from mutants_tables import DECLARED, EXCEPTIONS, GUARDS

ROOT = Path(__file__).resolve().parent.parent
LONG = (
    "gaussian_student_home",
    "with_an_eps_head_follows",
    "embedded_teacher",
    "a_teacher_needs_no_unconditional_mode",
    "learns_the_density_ratio",
    "embedded_images",
    "runs_that_fail_stop",
    "a_process_without_stepdistill",
    "a_stock_folder",
)
CHOICE = ["-m", "slow or not slow", "-k", " and ".join(f"not {name}" for name in LONG)]
IN_ONE_PROCESS = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=--import-mode=importlib"]

ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
OPPOSITE = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
EDGE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
DROPPED = {"detach", "clamp", "clamp_min", "clamp_max", "abs", "square", "sqrt", "exp", "reciprocal", "flip"}
"""Methods of tensors without whose call there is still a tensor."""


@dataclass(frozen=True)
class Mutant:
    """A file's text with one change, and the first line in which the two differ."""

    file: str
    text: str
    line: int
    old: str
    new: str


def changes(node: ast.AST) -> Iterator[ast.AST | str]:
    """What a node may be changed into: another node, or a text."""
    match node:
        case ast.BinOp(_, _, ast.Constant(float(value))) | ast.Constant(float(value)) if 0 < value <= 1e-4:
            return
        case ast.Assign(_, ast.Call(ast.Name("cast"))):
            return
        case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
            yield ast.BinOp(left, ARITHMETIC[type(op)](), right)
            if isinstance(op, ast.Add | ast.Sub):
                yield left
        case ast.Compare(left, [op], [right]):
            for table in (OPPOSITE, EDGE):
                if type(op) in table and not (table is EDGE and _is_draw(left)):
                    yield ast.Compare(left, [table[type(op)]()], [right])
        case ast.BoolOp(op, values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(float(value)):
            yield ast.Constant(1.5 * value + (value == 0))
        case ast.IfExp(test, body, orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Call(ast.Attribute(ast.Name("torch"), "no_grad"), [], []):
            yield "torch.enable_grad()"
        case ast.Call(ast.Attribute(tensor, name), _, _) if name in DROPPED and not _is_torch(tensor):
            yield tensor
        case ast.Expr(ast.Call()) | ast.AugAssign():
            yield "pass"
        case ast.Assign([ast.Name(name)], value) if name in {
            n.id for n in ast.walk(value) if isinstance(n, ast.Name)
        }:
            yield "pass"


def _is_torch(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("torch", "math", "F")


def _is_draw(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "uniform"


def visited(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree but annotations, imports, messages of errors, and defaults of options."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Raise | ast.JoinedStr):
        return
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "default_times":
        return
    if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith(
        "Annotated["
    ):  # it is in classes already
        return
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    yield node
    # How much is computed at once changes no number.
    named = zip(node.kwonlyargs, node.kw_defaults, strict=True) if isinstance(node, ast.arguments) else ()
    sizes = [default for argument, default in named if argument.arg == "block"]
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns") or (name == "decorator_list" and isinstance(node, ast.ClassDef)):
            continue
        for child in value if isinstance(value, list) else [value]:
            option = isinstance(node, ast.ClassDef) and isinstance(child, ast.AnnAssign)
            if isinstance(child, ast.AST) and not option and not (name == "kw_defaults" and child in sizes):
                yield from visited(child)


def mutants(file: str) -> Iterator[Mutant]:
    """Every change of a file."""
    text = (ROOT / file).read_text()
    data, tree = text.encode(), ast.parse(text)
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    seen = {text}
    for node in visited(tree):
        for change in changes(node):
            assert (
                isinstance(node, ast.expr | ast.stmt) and node.end_lineno and node.end_col_offset is not None
            )
            first = starts[node.lineno - 1] + node.col_offset
            last = starts[node.end_lineno - 1] + node.end_col_offset
            new = change if isinstance(change, str) else ast.unparse(change)
            if isinstance(node, ast.expr):
                new = f"({new})" if not isinstance(change, str) else new
            made = (data[:first] + new.encode() + data[last:]).decode()
            if made in seen:
                continue
            seen.add(made)
            with contextlib.suppress(SyntaxError):
                ast.parse(made)
                line = node.lineno
                yield Mutant(
                    file, made, line, text.splitlines()[line - 1].strip(), made.splitlines()[line - 1].strip()
                )


# --- a mutant in place -------------------------------------------------------------------------------------------


def graft(module: ModuleType, text: str) -> None:
    """Puts what ``text`` says into a module that is in use: other code of functions, other values of constants."""
    assert module.__file__ is not None
    new = ModuleType(module.__name__)
    new.__dict__.update({"__file__": module.__file__, "__package__": module.__package__})
    sys.modules[module.__name__] = new  # what dataclasses and pydantic look names up in
    try:
        exec(compile(text, module.__file__, "exec"), new.__dict__)
    finally:
        sys.modules[module.__name__] = module
    for name, value in new.__dict__.items():
        if not name.startswith("__") and name in module.__dict__:
            _replace(module, name, module.__dict__[name], value, module.__name__)


def _replace(owner: Any, name: str, old: Any, new: Any, home: str) -> None:
    """One name of a module or a class: grafted where other code may hold it, else set."""
    if isinstance(old, type):
        if old.__module__ == home and old is not new:
            for key, value in vars(new).items():
                if key == "__pydantic_validator__":
                    setattr(old, key, value)
                elif key in vars(old) and (callable(value) or not key.startswith("__")):
                    _replace(old, key, vars(old)[key], value, home)
    elif isinstance(old, cached_property):
        _regrow(old.func, new.func, home)
    elif isinstance(old, property):
        for one, other in ((old.fget, new.fget), (old.fset, new.fset)):
            _regrow(one, other, home)
    elif isinstance(old, FunctionType) and old.__code__.co_freevars != new.__code__.co_freevars:
        cells = {
            key: cell
            for function in (new, old)
            for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        }
        closure = tuple(cells[key] for key in new.__code__.co_freevars)
        made = FunctionType(new.__code__, old.__globals__, old.__name__, new.__defaults__, closure)
        made.__kwdefaults__ = new.__kwdefaults__
        setattr(owner, name, made)
    elif isinstance(old, FunctionType | classmethod | staticmethod) or hasattr(old, "__wrapped__"):
        _regrow(old, new, home)
    elif isinstance(old, dict) and any(isinstance(value, FunctionType) for value in old.values()):
        for key, value in old.items():  # a table of functions, which tests may hold as well
            if isinstance(value, FunctionType):
                _regrow(value, new[key], home)
    elif (isinstance(old, PLAIN) and not name.startswith(("model_", "_"))) or (
        is_dataclass(old) and type(old).__module__ != home
    ):
        setattr(owner, name, new)


def _regrow(old: Any, new: Any, home: str) -> None:
    """The code, defaults and closed-over values of a function, under whatever wraps it."""
    if old is None or old is new:
        return
    if not isinstance(old, FunctionType):
        inner = "__func__" if isinstance(old, classmethod | staticmethod) else "__wrapped__"
        _regrow(getattr(old, inner), getattr(new, inner), home)
        return
    if not old.__module__.startswith("stepdistill") and not hasattr(old, "__wrapped__"):
        return
    if old.__code__ is not new.__code__:
        old.__code__ = new.__code__
    old.__defaults__, old.__kwdefaults__ = new.__defaults__, new.__kwdefaults__
    for mine, other in zip(old.__closure__ or (), new.__closure__ or (), strict=True):
        if isinstance(mine.cell_contents, FunctionType):
            _regrow(mine.cell_contents, other.cell_contents, home)
        elif not isinstance(mine.cell_contents, type):  # `super()` stays that of the class in use
            mine.cell_contents = other.cell_contents


PLAIN = (int, float, str, bool, tuple, frozenset, type(None))


# --- the tests of a mutant ---------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """Of the tests of one mutant.

    Attributes:
        killed: whether one failed, or the processor time ran out.
        by: which one failed.
        took: processor time, in seconds.
        seconds: the time of each test that ran.
    """

    killed: bool
    by: str
    took: float
    seconds: dict[str, float]


class Loop:
    """A plugin of pytest that runs the collected tests once for each mutant, every time in a fork of this process.

    Args:
        file: what is changed.
        chosen: its mutants.
        say: where results are printed.
        folder: for what a fork has to say, and for its output.
    """

    def __init__(self, file: str, chosen: list[Mutant], say: TextIO, folder: Path) -> None:
        self.file, self.chosen, self.say, self.folder = file, chosen, say, folder
        self.name = file.removesuffix(".py").replace("/", ".")
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []
        self.survived = 0
        self.finished = False

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed = [report.nodeid]

    def pytest_runtestloop(self, session: Any) -> bool:
        text = (ROOT / self.file).read_text()
        whole = self.run(session, text, 3600)
        if whole.killed:
            print(f"{self.file}: {whole.by} fails without a change, see {self.folder}", file=self.say)
            os._exit(2)
        self.seconds = whole.seconds
        print(f"{self.file}: {len(session.items)} tests, {whole.took:.0f} s", file=self.say, flush=True)
        for mutant in self.chosen:
            found = self.run(session, mutant.text, int(3 * whole.took) + 20)
            reason = EXCEPTIONS.get((self.file, mutant.old, mutant.new))
            said = "killed  " if found.killed else "excepted" if reason else "SURVIVED"
            self.survived += said == "SURVIVED"
            if found.by:
                self.failed = [found.by, *(name for name in self.failed if name != found.by)]
            by = f" by {found.by}" if found.by else ""
            print(
                f"{said} {self.file}:{mutant.line} in {found.took:.1f} s{by}\n    - {mutant.old}\n    + {mutant.new}",
                file=self.say, flush=True,
            )  # fmt: skip
        self.finished = bool(session.items)
        return True

    def run(self, session: Any, text: str, seconds: int) -> Outcome:
        """The tests, those that killed before first and then the quick ones, on the file with another text."""
        place = self.folder / "outcome.json"
        rank = {name: i for i, name in enumerate(self.failed)}
        items = sorted(
            session.items, key=lambda it: (rank.get(it.nodeid, len(rank)), self.seconds.get(it.nodeid, 0.0))
        )
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
            self.seconds, self.failed = {}, []
            try:
                graft(sys.modules[self.name], text)
                for item, after in zip(items, [*items[1:], None], strict=True):
                    session.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
                    if self.failed:
                        break
            except BaseException as error:  # a mutant that cannot be imported is killed
                self.failed = [f"{type(error).__name__}: {error}"]
            place.write_text(json.dumps([self.failed, self.seconds]))
            os._exit(0)
        _, status, used = os.wait4(child, 0)
        failed, seen = ([], {})
        if place.exists():
            failed, seen = json.loads(place.read_text())
            place.unlink()
        by = failed[0] if failed else ""
        return Outcome(bool(failed or status), by, used.ru_utime + used.ru_stime, seen)


def started(file: str, chosen: list[Mutant], folder: Path) -> int:
    """A process of its own that runs a file's mutants; it ends with 10 plus how many survived."""
    child = os.fork()
    if child == 0:
        say = os.fdopen(os.dup(1), "w")
        with open(folder / "output.txt", "w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        os.chdir(ROOT)
        sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "toys"), str(ROOT / "tests" / "methods")]
        import pytest

        importlib.import_module(file.removesuffix(".py").replace("/", "."))
        loop = Loop(file, chosen, say, folder)
        declared = DECLARED if file.startswith("stepdistill/methods/") else []
        pytest.main([*IN_ONE_PROCESS, *CHOICE, *GUARDS[file], *declared], [loop])
        say.flush()
        os._exit(min(loop.survived, 200) + 10 if loop.finished else 3)
    return child


def ended(file: str, status: int, folder: Path) -> int:
    """How many survived in a process that ended with ``status``."""
    if os.waitstatus_to_exitcode(status) < 10:
        shutil.copy(folder / "output.txt", "mutants-output.txt")
        raise SystemExit(f"{file}: its tests could not be run, see mutants-output.txt")
    return os.waitstatus_to_exitcode(status) - 10


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="files of GUARDS; default all")
    parser.add_argument("--lines", default="1-100000", help="first and last line to change")
    parser.add_argument("--every", type=int, default=1, help="only each n-th mutant")
    parser.add_argument("--jobs", type=int, default=1, help="files at a time")
    arguments = parser.parse_args()
    first, last = map(int, arguments.lines.split("-"))
    odd = [file for file in arguments.files if file not in GUARDS]
    if odd:
        parser.error(f"{odd[0]} has no tests in GUARDS: it has {', '.join(GUARDS)}")
    import torch

    torch.set_num_threads(1)
    import diffusers  # noqa: F401  # imported once, before the forks

    survived = total = 0
    waiting, running = list(arguments.files or GUARDS), {}
    with tempfile.TemporaryDirectory() as name:
        while waiting or running:
            while waiting and len(running) < arguments.jobs:
                file = waiting.pop(0)
                folder = Path(name) / file.replace("/", "-")
                folder.mkdir()
                chosen = [m for m in mutants(file) if first <= m.line <= last][:: arguments.every]
                running[started(file, chosen, folder)] = file, len(chosen), folder
            child, status = os.wait()
            file, count, folder = running.pop(child)
            left = ended(file, status, folder)
            print(f"{file}: {count} mutants, {left} survived", flush=True)
            total, survived = total + count, survived + left
    print(f"{total} mutants, {survived} survived")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
