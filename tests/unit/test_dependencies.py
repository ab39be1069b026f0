"""setup.py asks for what is imported, and for nothing else."""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

IMPORT_NAMES = {
    "PyYAML": "yaml",
    "megatron-core": "megatron",
    "reasoning-gym": "reasoning_gym",
    "math-verify": "math_verify",
}
# Packages that are needed without an import of ours.
NEEDED_BY_OTHERS = {
    "psutil": "megatron-core's dist_checkpointing hangs in its save without it, and does not declare it",
}
# Imported only where an extra is installed, or by tests and tools for developers.
OPTIONAL = {"transformer_engine", "triton", "vllm", "tensorboard", "apex", "pytest", "setuptools"}
OPTIONAL |= {"mistral_common", "trackio", "mlflow", "trl"}


def setup_arguments() -> dict[str, ast.expr]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    call = next(
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup"
    )
    return {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}


def required() -> list[str]:
    """Names in install_requires, without versions."""
    return names(ast.literal_eval(setup_arguments()["install_requires"]))


def extra(name: str) -> list[str]:
    """Names in one of extras_require, without versions."""
    return names(ast.literal_eval(setup_arguments()["extras_require"])[name])


def names(requirements: list[str]) -> list[str]:
    return [re.split(r"[<>=!~\[; ]", text)[0] for text in requirements]


@functools.cache
def imported_libraries(folders: tuple[str, ...] = ("megatron_sftrl", "tools", "examples")) -> set[str]:
    """First names of every import in the product."""
    found: set[str] = set()
    for folder in folders:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", required())
def test_every_required_package_is_imported_or_has_a_stated_reason(package: str) -> None:
    name = IMPORT_NAMES.get(package, package)
    assert name in imported_libraries() or package in NEEDED_BY_OTHERS


def test_what_draws_the_report_comes_with_an_extra_that_the_tests_hold_as_well() -> None:
    drawing = set(extra("report"))
    rooms = [path for path in (ROOT / "megatron_sftrl").iterdir() if path.is_dir() and path.name != "apps"]
    others = ("tools", "examples", *(str(path.relative_to(ROOT)) for path in rooms))
    assert drawing <= imported_libraries(("megatron_sftrl/apps/report",)) - imported_libraries(others)
    assert not drawing & set(required())
    assert drawing <= set(extra("test"))
    assert "source tools/environment.sh report" in (ROOT / "examples/quickstart.sh").read_text()


def test_every_imported_library_is_required() -> None:
    known = {IMPORT_NAMES.get(package, package) for package in (*required(), *extra("report"))}
    known |= {"pydantic_core"}  # pydantic's own core, in lock-step with it
    local = {"megatron_sftrl", *(file.stem for file in (ROOT / "examples").rglob("*.py"))}
    local |= {file.stem for file in (ROOT / "tools").rglob("*.py")} | {"tools", "examples", "tests"}
    unknown = imported_libraries() - known - local - OPTIONAL - set(sys.stdlib_module_names)
    assert unknown == set()


def test_the_reasons_stay_honest() -> None:
    assert set(NEEDED_BY_OTHERS) <= set(required())
    assert not set(NEEDED_BY_OTHERS) & imported_libraries()


def test_the_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
