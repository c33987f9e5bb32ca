"""The package as it is installed: built, put into an empty environment, and used from an empty folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, TINY, lines_of

SMALL = [*TINY, "--dataset_name=python_docs", "--max_train_steps=2", "--max_eval_samples=2"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist, and the wheel that was built from what is in the sdist."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools builds the package")
    folder = tmp_path_factory.mktemp("built")
    # a copy: building leaves folders behind, and those of a build long ago would get into the wheel
    files = run("git", "ls-files", "-coz", "--exclude-standard", cwd=ROOT)
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    build = "from setuptools import build_meta as b; import sys; b.build_{}(sys.argv[1])"
    run(sys.executable, "-c", build.format("sdist"), folder, cwd=folder / "source")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    run(sys.executable, "-c", build.format("wheel"), folder, cwd=folder / sdist.name.removesuffix(".tar.gz"))
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The commands of an environment that has the wheel, and sees the libraries of the one that runs the tests."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=built)
    (packages,) = folder.glob("lib/python*/site-packages")
    libraries = {str(Path(module.__file__).parents[1]) for module in (torch, pytest, yaml)}
    (packages / "libraries.pth").write_text("\n".join(libraries) + "\n")
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index"]
    run(*pip, "--quiet", wheel, cwd=built)
    return folder / "bin"


def run(*command, cwd, **environment):
    """The output of a command, which must succeed. No `PYTHONPATH` leads it to this clone."""
    environment = {**os.environ, **environment}
    environment.pop("PYTHONPATH", None)
    command = list(map(str, command))
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_and_sdist_hold_the_whole_package(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "train_loop").rglob("*.py")}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "train_loop" / "recipes").glob("*.yaml")}
    wanted |= {f"train_loop/launch_configs/{path.name}" for path in (ROOT / "launch_configs").iterdir()}
    assert not wanted - names, "setup.cfg does not name their folders"
    assert not [name for name in names if name.startswith("tests/")]


def test_the_installed_command_trains_in_an_empty_folder(installed, tmp_path):
    """A recipe by name, from a folder that holds nothing."""
    output = run(installed / "train-loop", "--config=quickstart", *SMALL, cwd=tmp_path)
    assert "done: runs/quickstart" in output
    assert lines_of(tmp_path / "runs" / "quickstart")[-1]["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_an_installed_launch_config_launches_the_module(installed, tmp_path):
    """Two processes, by the config that the command prints."""
    printed = run(installed / "train-loop", "--print_launch_config", "multi_cpu", cwd=tmp_path)
    assert printed == (ROOT / "launch_configs" / "multi_cpu.yaml").read_text(encoding="utf-8")
    (tmp_path / "two.yaml").write_text(printed, encoding="utf-8")
    launch = [installed / "python", "-m", "accelerate.commands.launch", "--config_file", "two.yaml"]
    output = run(*launch, "-m", "train_loop.main", *SMALL, "--output_dir=run", cwd=tmp_path)
    assert "world size 2" in output and (tmp_path / "run" / "model.safetensors").is_file()


def test_an_unknown_launch_config_is_refused_with_the_names_that_there_are(capsys):
    from train_loop.main import main

    assert main(["--print_launch_config=many_gpus"]) == 1
    error = capsys.readouterr().err
    assert "many_gpus" in error and "multi_gpu" in error and "slurm" in error and "notebook" in error


def test_the_notebook_trains_and_generates(tmp_path, monkeypatch, capfd):
    """Its code cells in their order, with the quickstart's data and eight steps. The install cell is left out; a line
    that begins with an exclamation mark is a command of the shell, as in Jupyter."""
    notebook = json.loads((ROOT / "launch_configs" / "notebook.ipynb").read_text(encoding="utf-8"))
    cells = {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"}
    assert list(cells) == ["install", "parameters", "rows", "blocks", "train", "curve", "generate"]
    assert "%pip install" in cells.pop("install")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    names, outputs = {}, {}
    for name, source in cells.items():
        if name == "train":
            names["flags"] += " --max_train_steps 8 --logging_steps 2 --eval_steps 4 --max_eval_samples 4"
        source, _, command = source.partition("!")  # the shell's command comes last in a cell
        exec(compile(source, name, "exec"), names)
        if command:
            done = subprocess.run(eval("f" + repr(command), names), shell=True, timeout=300)
            assert done.returncode == 0, capfd.readouterr()
        if name == "parameters":
            names["recipe"], names["prompt"] = "quickstart", "The value of"
        outputs[name] = capfd.readouterr().out
    assert "72 rows for training, 7 for validation" in outputs["rows"]
    # Python's help texts differ between its versions
    assert re.search(r" -> [\d,]+ blocks of 128;", outputs["blocks"]) and outputs["blocks"].count("128 tokens: [") == 3
    assert "done: runs/notebook" in outputs["train"] and outputs["curve"].startswith("step 8: validation loss")
    assert outputs["generate"].count("The value of") == 2
    assert all(cell.get("outputs") in (None, []) for cell in notebook["cells"]), "the notebook is kept without outputs"
