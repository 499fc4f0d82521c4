"""Which module of the experiments may import which."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text("utf-8"))
    for path in sorted((ROOT / "experiments").rglob("*.py"))
}
MAY_IMPORT = {
    "common": {"common"},
    "model": {"common", "model"},
    "tasks": {"tasks"},
    "questions": {"common", "model", "tasks", "questions"},
    "caches": {"common", "model", "caches"},
    "decode": {"common", "model", "decode"},
    "leaderboard": {"common", "model", "leaderboard"},
    "theory": {"common", "theory"},
}


def imported(tree):
    """Modules of the experiments that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in names if name in MODULES}


def is_binary(tree):
    """Whether a module runs as a program: it has a `main`, or calls one when it is run."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "main" and len(node.args.args) == 1:
            return True
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            return True
    return False


BINARIES = {name for name, tree in MODULES.items() if is_binary(tree)}


def test_every_topic_has_its_program():
    assert {
        "experiments.caches.compress_cache",
        "experiments.caches.feasibility",
        "experiments.decode.decode",
        "experiments.leaderboard.leaderboard",
        "experiments.model.train_lm",
        "experiments.questions.ask",
        "experiments.questions.board",
        "experiments.questions.calibration",
        "experiments.questions.prefix",
        "experiments.theory.laws",
        "experiments.theory.lower_bound",
        "experiments.theory.sweep",
    } == BINARIES
    # Only the shared `main` starts an absl app.
    calls = {name for name, tree in MODULES.items() if "app.run(" in ast.unparse(tree)}
    assert calls == {"experiments.common.command"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_imports_a_program(name):
    assert not imported(MODULES[name]) & BINARIES


@pytest.mark.parametrize("name", [name for name in MODULES if name.count(".") == 2])
def test_rooms_import_what_they_may(name):
    rooms = {found.split(".")[1] for found in imported(MODULES[name]) if found.count(".") == 2}
    assert rooms <= MAY_IMPORT[name.split(".")[1]]
