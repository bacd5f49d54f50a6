"""The public names: complete, lazy, and not shadowed by modules."""

from __future__ import annotations

import ast
import importlib
import inspect as python_inspect
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import vitailor as vt

FUNCTIONS = (
    "bench",
    "compress",
    "evaluate",
    "inspect",
    "load",
    "report",
    "save",
    "shape_of",
    "train",
)


def type_checked_imports() -> set[str]:
    """Names that the package imports for type checkers."""
    tree = ast.parse(Path(vt.__file__).read_text("utf-8"))
    (block,) = [n for n in tree.body if isinstance(n, ast.If)]
    return {alias.name for node in block.body for alias in node.names}


def test_all_is_complete():
    assert len(set(vt.__all__)) == len(vt.__all__)
    assert set(vt.__all__) == set(vt._HOMES) == type_checked_imports()
    assert {"Budget", "ClosedForm", "TokenMerge", *FUNCTIONS} <= set(vt.__all__)
    errors = {
        name
        for name, value in vars(importlib.import_module("vitailor.errors")).items()
        if isinstance(value, type)
    }
    assert errors <= set(vt.__all__)
    assert set(vt.__all__) <= set(dir(vt))


@pytest.mark.parametrize("name", vt.__all__)
def test_every_name_is_there(name):
    value = getattr(vt, name)
    assert not isinstance(value, types.ModuleType)
    assert value.__name__ == name
    assert python_inspect.getdoc(value)


def test_no_module_is_called_like_a_public_name():
    modules = {m.name for m in pkgutil.iter_modules(vt.__path__)}
    assert modules.isdisjoint(vt.__all__)


def test_functions_stay_functions_when_modules_are_imported():
    code = (
        "import pkgutil, importlib, types, vitailor as vt\n"
        "for m in pkgutil.walk_packages(vt.__path__, 'vitailor.'):\n"
        "    if not m.name.endswith('__main__'): importlib.import_module(m.name)\n"
        f"for name in {FUNCTIONS}:\n"
        "    assert isinstance(getattr(vt, name), types.FunctionType), name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        _ = vt.prune


def test_errors_are_one_family():
    for name in vt.__all__:
        value = getattr(vt, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, vt.VitailorError)
