"""Changes the package's code, one small change at a time, and prints the changes that no test notices.

    python tests/mutants.py                                   # every file of GUARDS
    python tests/mutants.py stepdistill/methods/dmd.py        # one file
    python tests/mutants.py stepdistill/methods/dmd.py --lines 70-90

For each change (a mutant) the tests that guard its file run in a process of their own, on a copy of the checkout made
of links. A mutant is killed when a test fails or the processor time runs out; the command fails when one survives that
EXCEPTIONS does not explain. Left as they are: defaults of options, which a test would only say twice, and floors of
1e-4 and less. Trainings ("home", "follows") are left out of the tests: they take long to notice little.

Why not a library: mutmut 3 changes nothing in decorated functions or class bodies (properties, class methods,
``@torch.no_grad()``), has no mutants that drop a term, a statement or a stopped gradient, and takes no others;
cosmic-ray takes them as installed plugins, and starts a process for each mutant, most of which is the import of torch.
Here a mutant is a fork of one process that has imported torch.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ["tests/test_fake_score.py", "tests/test_options_matching.py"]
GUARDS: dict[str, list[str]] = {
    "stepdistill/fake_score.py": [
        *SHARED,
        "tests/test_dmd.py",
        "tests/test_diff_instruct.py",
        "tests/test_shift.py",
    ],
    "stepdistill/discriminator.py": [
        "tests/test_discriminator.py",
        *SHARED,
        "tests/test_pcm.py",
        "tests/test_shift.py",
    ],
    "stepdistill/terms.py": ["tests/test_options_matching.py", "tests/test_terms.py"],
    "stepdistill/regression.py": [*SHARED, "tests/test_diff_instruct.py", "tests/test_terms.py"],
    "stepdistill/decoupled.py": ["tests/test_dmd.py"],
    "stepdistill/first_step.py": ["tests/test_dmd.py", "tests/test_shift.py"],
    "stepdistill/subinterval.py": ["tests/test_phased_dmd.py", "tests/test_shift.py"],
    "stepdistill/sampler.py": ["tests/test_sampler.py", "tests/test_dmd.py", "tests/test_shift.py"],
    "stepdistill/derivative.py": ["tests/test_derivative.py"],
    "stepdistill/methods/dmd.py": ["tests/test_dmd.py", *SHARED],
    "stepdistill/methods/phased_dmd.py": ["tests/test_phased_dmd.py", *SHARED],
    "stepdistill/methods/diff_instruct.py": ["tests/test_diff_instruct.py", *SHARED],
    "stepdistill/methods/f_distill.py": ["tests/test_f_distill.py", *SHARED],
    "stepdistill/methods/sid.py": ["tests/test_sid_sim.py", *SHARED],
    "stepdistill/methods/sim.py": ["tests/test_sid_sim.py", *SHARED],
    "stepdistill/methods/consistency.py": ["tests/test_consistency.py", "tests/test_contract.py"],
    "stepdistill/methods/flow_map.py": ["tests/test_flow_map.py", "tests/test_contract.py"],
    "stepdistill/methods/freeflow.py": ["tests/test_freeflow.py", "tests/test_contract.py"],
    "stepdistill/methods/instaflow.py": ["tests/test_reflow_family.py", "tests/test_contract.py"],
    "stepdistill/methods/lcm.py": ["tests/test_lcm.py", "tests/test_contract.py"],
    "stepdistill/methods/meanflow.py": ["tests/test_meanflow.py", "tests/test_contract.py"],
    "stepdistill/methods/pcm.py": ["tests/test_pcm.py", "tests/test_contract.py"],
    "stepdistill/methods/reflow.py": ["tests/test_reflow.py", "tests/test_contract.py"],
    "stepdistill/methods/rfpp.py": ["tests/test_reflow_family.py", "tests/test_contract.py"],
    "stepdistill/methods/scm.py": ["tests/test_scm.py", "tests/test_contract.py"],
    "stepdistill/methods/slimflow.py": ["tests/test_reflow_family.py", "tests/test_slim.py"],
    "stepdistill/methods/tbcm.py": ["tests/test_tbcm.py", "tests/test_contract.py"],
    "stepdistill/methods/tcd.py": ["tests/test_tcd.py", "tests/test_contract.py"],
    "stepdistill/methods/tscd.py": ["tests/test_tscd.py", "tests/test_contract.py"],
}
"""The test files that are to notice a change in a file, those that fail soonest first."""

EXCEPTIONS: dict[tuple[str, str, str], str] = {
    (
        "stepdistill/subinterval.py",
        "return ratio, (sigma_t.square() - (ratio * sigma_s).square()).clamp_min(0).sqrt()",
        "return ratio, (sigma_t.square() - (ratio * sigma_s).square()).sqrt()",
    ): "a guard against rounding, which never took c^2 below 0 on any path at 5,000 neighbours s, t in float32",
}
"""(file, line as it is, line as changed) -> why no test is to notice."""

CHOICE = ["-m", "not slow", "-k", "not home and not follows"]

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
                if type(op) in table:
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


def visited(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree but annotations, imports, messages of errors, and defaults of options."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Raise | ast.JoinedStr):
        return
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns") or (name == "decorator_list" and isinstance(node, ast.ClassDef)):
            continue
        for child in value if isinstance(value, list) else [value]:
            option = isinstance(node, ast.ClassDef) and isinstance(child, ast.AnnAssign)
            if isinstance(child, ast.AST) and not option:
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


def linked_copy(folder: Path) -> None:
    """A checkout of links: the package's folders are real, so that one file of it can be another."""
    for entry in ROOT.iterdir():
        if entry.name != "stepdistill" and not entry.name.startswith((".", "runs")):
            (folder / entry.name).symlink_to(entry)
    for place, folders, files in os.walk(ROOT / "stepdistill"):
        folders[:] = [name for name in folders if name != "__pycache__"]
        own = folder / Path(place).relative_to(ROOT)
        own.mkdir()
        for name in files:
            (own / name).symlink_to(Path(place) / name)


def run(folder: Path, mutant: Mutant | None, tests: list[str], seconds: int) -> tuple[int, float]:
    """The exit status of the tests, 0 when they pass, with a mutant in place, and their processor time in seconds."""
    if mutant is not None:
        place = folder / mutant.file
        place.unlink()
        place.write_text(mutant.text)
    child = os.fork()
    if child == 0:
        with open(folder / "output.txt", "w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        os.chdir(folder)
        sys.path[:0] = [str(folder), str(folder / "tests")]
        sys.dont_write_bytecode = True
        import pytest

        # Bounded by _exit: nothing of the parent is to be flushed or closed here.
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *CHOICE, *tests])))
    _, status, used = os.wait4(child, 0)
    if mutant is not None:
        place.unlink()
        place.symlink_to(ROOT / mutant.file)
    return status, used.ru_utime + used.ru_stime


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="files of GUARDS; default all")
    parser.add_argument("--lines", default="1-100000", help="first and last line to change")
    parser.add_argument("--every", type=int, default=1, help="only each n-th mutant")
    arguments = parser.parse_args()
    first, last = map(int, arguments.lines.split("-"))
    odd = [file for file in arguments.files if file not in GUARDS]
    if odd:
        parser.error(f"{odd[0]} has no tests in GUARDS: it has {', '.join(GUARDS)}")
    import torch

    torch.set_num_threads(1)
    import diffusers  # noqa: F401  # imported once, before the forks
    import pytest  # noqa: F401

    survivors = total = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        linked_copy(folder)
        for file in arguments.files or GUARDS:
            status, took = run(folder, None, GUARDS[file], 3600)
            if status:
                shutil.copy(folder / "output.txt", "mutants-output.txt")
                print(f"{file}: its tests fail without a change, see mutants-output.txt")
                return 1
            print(f"{file}: its tests take {took:.0f} s", flush=True)
            chosen = [mutant for mutant in mutants(file) if first <= mutant.line <= last]
            for mutant in chosen[:: arguments.every]:
                status, took = run(folder, mutant, GUARDS[file], int(3 * took) + 20)
                reason = EXCEPTIONS.get((file, mutant.old, mutant.new))
                said = "killed  " if status else "excepted" if reason else "SURVIVED"
                total, survivors = total + 1, survivors + (said == "SURVIVED")
                print(f"{said} {file}:{mutant.line}\n    - {mutant.old}\n    + {mutant.new}", flush=True)
    print(f"{total} mutants, {survivors} survived")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
