"""How files may know each other: imports go one way, a wing has one door, and a test module is no library."""

import ast
import graphlib

import pytest
from conftest import ROOT

pytestmark = pytest.mark.quick

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
    try:
        graphlib.TopologicalSorter({name: imports(name) for name in MODULES}).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"these modules import each other in a circle: {' <- '.join(error.args[1])}", pytrace=False)


def test_a_file_can_be_read_in_one_sitting():
    """loop.py has at most 150 lines, every other file 300."""
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES.values()}
    assert {name: n for name, n in lengths.items() if n > (150 if name == "loop.py" else 300)} == {}


@pytest.mark.parametrize("wing", sorted(WINGS))
def test_a_door_says_what_is_behind_it(wing):
    door = ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text(encoding="utf-8")))
    for path in (PACKAGE / wing).glob("[a-z]*.py"):
        assert path.name in door, f"the docstring of train_loop/{wing}/__init__.py lacks {path.name}"


def test_test_modules_do_not_import_each_other():
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert not name.startswith("test_"), f"{path.name} imports {name}: what both need goes into conftest.py"


def test_programs_are_files_and_no_strings():
    """So that the linter reads them. tests/programs/ is their place."""
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.count("\n") > 2:
                try:
                    program = ast.parse(node.value).body
                except SyntaxError:
                    continue
                imports_something = any(isinstance(line, ast.Import | ast.ImportFrom) for line in program)
                where = f"{path.relative_to(ROOT)}, line {node.lineno}"
                assert not imports_something, f"{where}: this program belongs into a file of tests/programs/"


@pytest.mark.parametrize("wing", sorted(WINGS))
def test_a_wing_is_entered_by_its_door_alone(wing):
    """Nothing outside imports a file behind the door, only what `train_loop/<wing>/__init__.py` names."""
    behind = {name for name in MODULES if name.startswith(f"train_loop.{wing}.")}
    for name in MODULES:
        if wing_of(name) != wing and name != f"train_loop.{wing}":
            assert not imports(name) & behind, f"{name} imports {imports(name) & behind}: use train_loop.{wing}"
