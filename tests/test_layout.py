"""The floors: who may import whom, no cycles, Ray and torch only where allowed, no foreign owner of our names."""

import ast
import gc
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("adapters", "engine", "jobs", "manifests", "trainer")
MAY_IMPORT = {
    "manifests": {"manifests"},
    "engine": {"engine", "manifests"},
    "trainer": {"trainer", "manifests"},
    "adapters": {"adapters", "trainer", "manifests"},
    "jobs": set(PACKAGES),
}
FLOOR_LIBRARIES = {"numpy", "pydantic", "yaml"}
RAY_MODULES = {"engine.pipeline", "trainer.launch"}
MAX_JOB_FUNCTION_LINES = 60
MAX_MODULE_LINES = 500


def modules() -> dict[str, Path]:
    """Module name to file, over the five packages."""
    found: dict[str, Path] = {}
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def parse_all(paths: Iterable[Path]) -> dict[Path, ast.Module]:
    """The tree of every file. The collector waits: in Python 3.11 a finaliser that formats a traceback parses too,
    and the outer parse then dies of `SystemError: AST constructor recursion depth mismatch`."""
    gc.disable()
    try:
        return {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    finally:
        gc.enable()


def imports(path: Path, *, nested: bool) -> set[str]:
    """Absolute names of the modules that a file imports; `nested` takes those inside functions too."""
    tree = TREES[path]
    nodes = ast.walk(tree) if nested else iter(tree.body)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


MODULES = modules()
TREES = parse_all(MODULES.values())
TOP_LEVEL = {name: {full.partition(".")[0] for full in imports(path, nested=True)} for name, path in MODULES.items()}


def test_imports_go_down() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in TOP_LEVEL.items()
        for target in sorted(targets & set(PACKAGES))
        if target not in MAY_IMPORT[name.partition(".")[0]]
    ]
    assert not wrong, wrong


def test_the_floor_stands_on_the_standard_library_numpy_pydantic_and_pyyaml() -> None:
    allowed = set(sys.stdlib_module_names) | FLOOR_LIBRARIES | {"manifests"}
    wrong = {name: targets - allowed for name, targets in TOP_LEVEL.items() if name.startswith("manifests")}
    assert not {name: extra for name, extra in wrong.items() if extra}


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("ray", lambda name: name in RAY_MODULES or name.startswith("jobs")),
        ("torch", lambda name: name.partition(".")[0] in {"trainer", "adapters", "jobs"}),
        ("deepspeed", lambda name: name.partition(".")[0] in {"trainer", "jobs"}),
        ("mne", lambda name: name.partition(".")[0] in {"engine", "jobs"}),
        ("peft", lambda name: name.partition(".")[0] == "adapters"),
    ],
)
def test_a_library_is_imported_only_where_allowed(library: str, allowed) -> None:
    users = {name for name, targets in TOP_LEVEL.items() if library in targets}
    assert users, f"nothing imports {library}: is the rule still needed?"
    assert not {name for name in users if not allowed(name)}


def test_there_is_no_import_cycle() -> None:
    graph = {
        name: {target for target in imports(path, nested=True) if target in MODULES} for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name in done:
            return
        for target in graph[name] - {name}:
            visit(target, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_own_packages_are_never_imported_inside_a_function() -> None:
    hidden = {
        name: extra
        for name, path in MODULES.items()
        if not name.startswith("jobs.")  # a verb loads torch or ray only when it runs
        and (
            extra := {
                m for m in imports(path, nested=True) - imports(path, nested=False) if m.partition(".")[0] in PACKAGES
            }
        )
    }
    assert not hidden


def test_init_files_hold_a_docstring_and_nothing_else() -> None:
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            body = TREES[path].body
            assert len(body) == 1, name
            assert isinstance(body[0], ast.Expr), name


def test_modules_and_job_functions_keep_their_size() -> None:
    long_modules = {
        name: n for name, path in MODULES.items() if (n := len(path.read_text().splitlines())) > MAX_MODULE_LINES
    }
    assert not long_modules
    long_functions = [
        f"{name}.{node.name}"
        for name, path in MODULES.items()
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= MAX_JOB_FUNCTION_LINES + 20
    ]
    assert not long_functions


def test_no_foreign_distribution_owns_our_package_names() -> None:
    owners = metadata.packages_distributions()
    foreign = {package: owners.get(package, []) for package in PACKAGES if set(owners.get(package, [])) - {"kymo"}}
    assert not foreign


def test_engine_and_floor_load_without_torch_and_ray() -> None:
    names = [name for name in MODULES if name.partition(".")[0] in {"engine", "manifests"} and name not in RAY_MODULES]
    code = (
        f"import sys\nfor name in {names!r}: __import__(name)\nprint([m for m in ('torch', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_the_trainer_loads_without_ray() -> None:
    names = [name for name in MODULES if name.partition(".")[0] in {"trainer", "adapters"} and name not in RAY_MODULES]
    code = f"import sys\nsys.modules['ray'] = None\nfor name in {names!r}: __import__(name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_readme_has_a_line_for_every_module() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    paths = [path.relative_to(REPOSITORY) for path in MODULES.values() if path.name != "__init__.py"]
    missing = [str(path) for path in paths if f"\n  {Path(*path.parts[1:])} " not in readme]
    assert not missing
