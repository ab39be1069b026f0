"""The house's rules that a program can check: who imports whom, and how long files and functions are."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_sftrl"

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"types", "config", "registry", "vocab_parallel"}),
    frozenset({"models"}),
    frozenset({"losses", "data", "rl", "observability"}),
    frozenset({"__init__"}),  # the public names: nothing above a loss
    frozenset({"engine"}),
    frozenset({"rollout"}),
    frozenset({"trainers"}),
    frozenset({"apps"}),  # they stand on the core, nothing in the core imports them
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
VLLM_FILES = {PACKAGE / "rollout" / "vllm.py"}
LONGEST_FILE = 600
LONGEST_FUNCTION = 80
SMALLEST_WITH_ONE_DOOR = 100
SMALL_FOR_A_REASON = {
    "apps/compare/command.py": "each command line is parsed with it: it imports nothing heavy",
    "apps/coupling/command.py": "each command line is parsed with it: it imports nothing heavy",
    "losses/gift.py": "a loss, found by its name",
    "losses/ts_opsd.py": "a loss, found by its name",
}
"""Files that are shorter and have a single importer: plug-ins, optional imports, processes of their own."""

FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [
    *FILES,
    *(file for name in ("tools", "examples", "slurm") for file in sorted((ROOT / name).rglob("*.py"))),
]


def room_of(file: Path) -> str:
    """The folder, or the file at the top, that a module belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(source: str, *, package: str) -> Iterator[str]:
    """Every module that the source imports, also inside functions, by its absolute name.

    `from a import b` counts as `a.b` as well, since b may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            yield from (str(name.value) for name in node.args[:1] if isinstance(name, ast.Constant))


@functools.cache
def modules_of(file: Path) -> list[str]:
    package = ".".join(file.relative_to(ROOT).parent.parts)
    return list(imported_modules(file.read_text(encoding="utf-8"), package=package))


def rooms_used(file: Path) -> set[str]:
    """The other rooms of this package that a file imports from."""
    names = [module.split(".") for module in modules_of(file)]
    rooms = {parts[1] for parts in names if parts[0] == "megatron_sftrl" and len(parts) > 1}
    return rooms & {room_of(path) for path in FILES} - {room_of(file)}


def layer_of(room: str) -> int:
    return next(level for level, rooms in enumerate(LAYERS) if room in rooms)


def test_the_parser_sees_every_kind_of_import() -> None:
    source = (
        "import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\n"
        "def h():\n    import i\n    importlib.import_module('j.k')\n"
    )
    found = set(imported_modules(source, package="p.q"))
    assert {"a.b", "c", "c.d", "p.q.e", "p.f", "p.f.g", "i", "j.k"} <= found


def test_every_room_stands_in_the_layer_table() -> None:
    assert FILES
    assert {room_of(file) for file in FILES} <= frozenset.union(*LAYERS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down_the_layers(file: Path) -> None:
    own = room_of(file)
    for room in rooms_used(file):
        assert layer_of(room) <= layer_of(own), f"{own} imports {room}, which stands above it"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_room_imports_where_a_name_is_defined_not_the_front_door(file: Path) -> None:
    if room_of(file) != "cli":  # the command line prints the version, which stands there
        assert "megatron_sftrl" not in modules_of(file)


def test_no_two_rooms_import_each_other() -> None:
    uses: dict[str, set[str]] = {}
    for file in FILES:
        uses.setdefault(room_of(file), set()).update(rooms_used(file))
    for room in uses:
        seen: set[str] = set()
        waiting = list(uses[room])
        while waiting:
            other = waiting.pop()
            assert other != room, f"{room} imports itself through {sorted(seen)}"
            if other not in seen:
                seen.add(other)
                waiting.extend(uses.get(other, ()))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_megatron_stays_in_the_engine_and_vllm_in_its_files(file: Path) -> None:
    libraries = {module.split(".")[0] for module in modules_of(file)}
    assert "megatron" not in libraries or room_of(file) == "engine"
    assert "vllm" not in libraries or file in VLLM_FILES
    assert not [module for module in modules_of(file) if module.startswith("megatron.training")]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_is_one_idea_and_says_which(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert source.count("\n") <= LONGEST_FILE
    assert ast.get_docstring(ast.parse(source)), "a file opens with what it is for"


def importers() -> dict[Path, set[Path]]:
    """The files of the package that import each of its files."""
    file_of = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}
    found: dict[Path, set[Path]] = {file: set() for file in FILES}
    for file in FILES:
        for module in modules_of(file):
            if module in file_of and file_of[module] != file:
                found[file_of[module]].add(file)
    return found


def test_a_small_file_with_one_importer_has_a_reason() -> None:
    small = {
        str(file.relative_to(PACKAGE))
        for file, users in importers().items()
        if file.name != "__init__.py"
        and len(users) == 1
        and file.read_text(encoding="utf-8").count("\n") < SMALLEST_WITH_ONE_DOOR
    }
    assert small == set(SMALL_FOR_A_REASON), "fold it into the file whose reader has to open it"


def test_no_file_imports_itself_through_others() -> None:
    uses: dict[Path, set[Path]] = {file: set() for file in FILES}
    for file, users in importers().items():
        for user in users:
            uses[user].add(file)
    done: set[Path] = set()

    def visit(file: Path, way: tuple[Path, ...]) -> None:
        assert file not in way, " -> ".join(str(each.relative_to(PACKAGE)) for each in (*way, file))
        if file not in done:
            for other in sorted(uses[file]):
                visit(other, (*way, file))
            done.add(file)

    for file in FILES:
        visit(file, ())


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_function_is_about_a_screen(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= LONGEST_FUNCTION, f"{node.name} is too long"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_is_left_for_later(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    for word in ("TODO", "FIXME", "NotImplementedError"):
        assert word not in source


def test_the_package_and_its_command_line_load_no_heavy_library() -> None:
    code = (
        "import sys, megatron_sftrl, megatron_sftrl.cli\n"
        "heavy = {'megatron', 'vllm', 'transformers', 'datasets', 'wandb', 'matplotlib', 'reasoning_gym'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
