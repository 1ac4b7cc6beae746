"""The rules of the house, read from the sources: floors, sizes, what must not be imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "omega_qvla"
MAX_FILE, MAX_FUNCTION = 600, 100

# part -> the parts that it may import from; itself, `errors` and `files` always. A part is a
# subpackage, or a module that lies directly in the package.
_MODELS = {"config", "numerics", "kernels", "modules"}
_SHARED = {*_MODELS, "policies", "pack"}
_BUILD = {*_SHARED, "calibration"}
_RUN = {*_SHARED, "bundle", "runtime"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "__init__": set(),
    "config": set(),
    "numerics": {"config"},
    "kernels": {"config", "numerics"},
    "modules": {"config", "numerics", "kernels"},
    "policies": _MODELS,
    "pack": {*_MODELS, "policies"},
    "bundle": _SHARED,
    "calibration": _SHARED,
    "quantize": _BUILD,
    "envs": {"policies"},
    "runtime": {*_SHARED, "bundle"},
    "serving": _RUN,
    "evaluation": {*_RUN, "envs"},
    "cli": {*_BUILD, *_RUN, "quantize", "serving", "envs", "evaluation"},
}
GROUND = {"errors", "files", "__init__"}
BUILD_WING = {"calibration", "quantize"}
RUN_WING = {"runtime", "envs", "serving", "evaluation"}
# Imported inside the functions that need them, never when a module is loaded.
LAZY = {"mujoco", "metaworld", "gymnasium", "matplotlib", "triton", "ray", "scipy", "pyarrow", "av"}
LAZY |= {"libero", "robosuite"}
HEAVY = {*LAZY, "torch", "numpy", "tokenizers", "safetensors"}


def sources(*folders: str) -> list[Path]:
    """The Python files of these folders of the repository."""
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    assert files, folders
    return files


def parse(file: Path) -> ast.Module:
    """The file's syntax tree."""
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def where(file: Path, node: ast.AST | None = None) -> str:
    """path:line, for a message."""
    line = f":{node.lineno}" if isinstance(node, ast.stmt | ast.expr) else ""
    return f"{file.relative_to(ROOT)}{line}"


def part_of(file: Path) -> str:
    """The part of the package that a source file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_name(file: Path) -> str:
    """Dotted name of the package that relative imports in `file` start from."""
    return ".".join(("omega_qvla", *file.relative_to(PACKAGE).parent.parts))


def imported(file: Path, node: ast.AST) -> Iterator[str]:
    """Dotted names that one statement imports, relative ones made absolute."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module_name(file).split(".")
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
        and node.args
        and isinstance(node.args[0], ast.Constant)
    ):
        yield str(node.args[0].value)


def own_imports(file: Path) -> Iterator[tuple[str, ast.AST]]:
    """(part, statement) of every import from our own package, wherever in the file it is."""
    for node in ast.walk(parse(file)):
        for name in imported(file, node):
            if name.split(".")[0] == "omega_qvla":
                inner = name.split(".")[1:]
                known = inner and inner[0] in MAY_IMPORT
                yield (inner[0] if known else "__init__"), node


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is loaded, `if TYPE_CHECKING` left out."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_import(node.orelse)
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            yield from at_import(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from at_import(handler.body)


def test_every_part_has_a_floor() -> None:
    parts = {part_of(file) for file in sources("src")}
    assert parts <= set(MAY_IMPORT), "say in MAY_IMPORT what the new part may import"


def test_the_floors_are_what_the_design_says() -> None:
    for part in BUILD_WING:
        assert not MAY_IMPORT[part] & RUN_WING
    for part in RUN_WING:
        assert not MAY_IMPORT[part] & BUILD_WING
    order: list[str] = []  # no cycle: every part can come after all that it imports
    while len(order) < len(MAY_IMPORT):
        ready = [p for p, below in MAY_IMPORT.items() if p not in order and below <= set(order)]
        assert ready, f"a cycle among {sorted(set(MAY_IMPORT) - set(order))}"
        order += ready


def test_imports_point_down() -> None:
    faults = [
        f"{where(file, node)}: {part_of(file)} imports {part}"
        for file in sources("src")
        for part, node in own_imports(file)
        if part not in {*MAY_IMPORT[part_of(file)], part_of(file), *GROUND}
    ]
    assert not faults, "\n".join(faults)


def test_heavy_and_optional_packages_are_imported_where_they_are_used() -> None:
    faults = [
        f"{where(file, node)}: {name}"
        for file in sources("src")
        for node in at_import(parse(file).body)
        for name in imported(file, node)
        if name.split(".")[0] in LAZY
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("module", ["omega_qvla", "omega_qvla.cli.main", "omega_qvla.config"])
def test_import_is_light(module: str) -> None:
    code = (
        (f"import sys, {module}\nprint(*sorted({sorted(HEAVY)!r} & sys.modules.keys()))")
        .replace("[", "{")
        .replace("]", "}")
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert not run.stdout.strip(), f"importing {module} imports {run.stdout.strip()}"


def test_public_names_exist() -> None:
    import omega_qvla

    for name in omega_qvla.__all__:
        assert getattr(omega_qvla, name) is not None, name


def test_files_are_short() -> None:
    lengths = {
        where(file): len(file.read_text(encoding="utf-8").splitlines())
        for file in sources("src", "tests", "training")
    }
    assert not {name: length for name, length in lengths.items() if length > MAX_FILE}


def test_functions_are_short() -> None:
    faults = [
        f"{where(file, node)}: {node.name} has {length} lines"
        for file in sources("src", "tests", "training")
        for node in ast.walk(parse(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION
    ]
    assert not faults, "\n".join(faults)


def unsafe_load(node: ast.AST) -> str | None:
    """What in a call may run code from a file, or None."""
    if not isinstance(node, ast.Call):
        return None
    name = ast.unparse(node.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "joblib.load"):
        return name
    if name == "torch.load" and keywords.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
        return f"{name} with allow_pickle"
    return None


def test_no_file_can_run_code() -> None:
    faults = [
        f"{where(file, node)}: {fault}"
        for file in sources("src", "training")
        for node in ast.walk(parse(file))
        if (fault := unsafe_load(node))
    ]
    assert not faults, "\n".join(faults)


def test_no_globals_are_rebound() -> None:
    faults = [
        where(file, node)
        for file in sources("src", "training")
        for node in ast.walk(parse(file))
        if isinstance(node, ast.Global)
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("pickle.load(f)", True),
        ("torch.load(f)", True),
        ("torch.load(f, weights_only=False)", True),
        ("torch.load(f, weights_only=True)", False),
        ("np.load(f, allow_pickle=True)", True),
        ("np.load(f)", False),
        ("pickle.dumps(f)", False),
    ],
)
def test_unsafe_load_is_recognised(code: str, found: bool) -> None:
    assert (unsafe_load(ast.parse(code, mode="eval").body) is not None) is found


def test_import_forms_are_recognised() -> None:
    file = PACKAGE / "pack" / "reader.py"
    forms = {
        "import omega_qvla.envs.base": "omega_qvla.envs.base",
        "from omega_qvla import envs": "omega_qvla.envs",
        "from ..envs import base": "omega_qvla.envs.base",
        "from . import writer": "omega_qvla.pack.writer",
        "import_module('omega_qvla.envs')": "omega_qvla.envs",
    }
    for code, expected in forms.items():
        tree = ast.parse(code)
        names = [name for node in ast.walk(tree) for name in imported(file, node)]
        assert names == [expected], code
    tree = ast.parse("try:\n    import a\nexcept E:\n    import b\ndef f():\n    import c")
    names = [name for node in at_import(tree.body) for name in imported(file, node)]
    assert names == ["a", "b"]
