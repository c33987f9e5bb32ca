"""How the files of the package may know each other: imports go one way, and a wing has one door."""

import ast
import graphlib

import pytest
from conftest import ROOT

PACKAGE = ROOT / "train_loop"
WINGS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(name):
    """The modules of the package that a module imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "train_loop":
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inner or {node.module}
    return found


def wing_of(name):
    return name.split(".")[1] if name.count(".") and name.split(".")[1] in WINGS else None


def test_no_import_goes_in_a_circle():
    list(graphlib.TopologicalSorter({name: imports(name) for name in MODULES}).static_order())


@pytest.mark.parametrize("wing", sorted(WINGS))
def test_a_wing_is_entered_by_its_door_alone(wing):
    """Nothing outside imports a file behind the door, only what `train_loop/<wing>/__init__.py` names."""
    behind = {name for name in MODULES if name.startswith(f"train_loop.{wing}.")}
    for name in MODULES:
        if wing_of(name) != wing and name != f"train_loop.{wing}":
            assert not imports(name) & behind, f"{name} imports {imports(name) & behind}: use train_loop.{wing}"
