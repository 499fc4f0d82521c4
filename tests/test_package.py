"""The package as a whole: its floors, its docstrings, its wheel."""

import ast
import graphlib
import importlib
import importlib.metadata
import pathlib
import subprocess
import sys
import tomllib
import zipfile

import pytest

import coreset_jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "coreset_jax"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# A module imports from its own floor and from those below. A folder is on one floor.
FLOORS = {
    "_version": 0,
    "_src.checks": 0,
    "_src.meshes": 0,
    "_src.precision": 0,
    "_src.attention": 1,
    "_src.geometry": 2,
    "_src.core": 3,
    "_src.queries": 4,
    "_src.balance": 4,
    "_src.fit": 4,
    "_src.stream": 5,
    "_src": 5,
    "geometry": 6,
    "walks": 6,
    "queries": 6,
    "budgets": 6,
    "balancing": 6,
    "combinators": 6,
    "refit": 6,
    "fitting": 7,
    "attending": 7,
    "choosing": 7,
    "baselines": 7,
    "guarantees": 7,
    "streaming": 7,
    "prefixes": 6,
    "compression": 8,
    "_exporting": 9,
    "_command": 9,
    "nn": 8,
}

MOST_LINES = 450


def floor(module: str) -> int:
    """The floor of a module; ``coreset_jax`` itself is the roof."""
    _, _, inner = module.partition(".")
    parts = inner.split(".")
    room = ".".join(parts[:2]) if parts[0] == "_src" else parts[0]
    return FLOORS[room] if inner else max(FLOORS.values()) + 1


def imported(path: pathlib.Path) -> set[str]:
    """Absolute names of the modules that a file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import by the absolute name"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names.update(member for member in members if member in MODULES)
            if not members <= MODULES.keys():
                names.add(node.module)
    return names


def own_imports(module: str) -> set[str]:
    """The modules of this package that a module imports."""
    return {name for name in imported(MODULES[module]) if name.split(".")[0] == "coreset_jax"}


def test_imports_come_from_floors_below():
    upward = [
        (module, name)
        for module in MODULES
        for name in own_imports(module)
        if floor(name) > floor(module)
    ]
    assert not upward


def test_imports_make_no_circle():
    graphlib.TopologicalSorter({module: own_imports(module) for module in MODULES}).prepare()


def test_imports_are_declared_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {requirement.partition(">")[0] for requirement in project["dependencies"]}
    declared = {name.replace("-", "_") for name in declared - {"absl-py"}} | {"absl"}
    # Modules that want an extra say so where it is missing.
    declared |= {
        requirement.partition(">")[0] for requirement in project["optional-dependencies"]["files"]
    }
    allowed = declared | sys.stdlib_module_names | {"coreset_jax", "numpy"}  # JAX needs NumPy.
    for module, path in MODULES.items():
        # The command runs what a checkout alone has, and says so where it is missing.
        more = {"experiments"} if module == "coreset_jax._command" else set()
        assert {name.split(".")[0] for name in imported(path)} <= allowed | more, module


def public_definitions(body: list[ast.stmt]) -> list[ast.AST]:
    """Public functions and classes of a module, and the public methods of those classes."""
    found = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            # An overload is a signature alone.
            if "overload" in {getattr(each, "id", "") for each in node.decorator_list}:
                continue
            found.append(node)
            if isinstance(node, ast.ClassDef):
                found += public_definitions(node.body)
    return found


def test_what_is_public_has_a_docstring():
    bare = []
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        bare += [] if ast.get_docstring(tree) else [module]
        bare += [
            f"{module}.{node.name}"
            for node in public_definitions(tree.body)
            if not ast.get_docstring(node)
        ]
    assert not bare


def test_modules_of_the_library_stay_modules():
    """No public function hides a module of its own name."""
    tops = [path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()]
    for name in (each for each in tops if not each.startswith("_")):
        module = importlib.import_module(f"coreset_jax.{name}")
        assert getattr(coreset_jax, name) is module


def test_files_are_short():
    folders = ("coreset_jax", "experiments", "benchmarks", "configs", "tests")
    lines = {
        path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
    }
    assert not {path: count for path, count in lines.items() if count > MOST_LINES}


def test_version_is_the_installed_one():
    assert importlib.metadata.version("coreset-jax") == coreset_jax.__version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder],
        cwd=ROOT,
        check=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = f"coreset_jax-{coreset_jax.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"coreset_jax", metadata}
    assert f"{metadata}/licenses/LICENSE" in names
    sources = {str(path.relative_to(ROOT)) for path in [*MODULES.values(), PACKAGE / "py.typed"]}
    assert {name for name in names if not name.startswith(metadata)} == sources


@pytest.mark.slow
def test_wheel_imports_where_it_is_installed(wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--target", tmp_path, wheel], check=True)
    # The working folder comes first on the path of -c, before the editable installation.
    program = "import coreset_jax; print(coreset_jax.__file__)"
    found = subprocess.check_output([sys.executable, "-c", program], cwd=tmp_path, text=True)
    assert pathlib.Path(found.strip()).is_relative_to(tmp_path)
