"""The test suite with the lowest versions of all libraries that setup.cfg allows, and with the newest that pip finds.

python tests/benchmarks/versions.py --lowest python3.10 --newest python3.13
python tests/benchmarks/versions.py --lowest -- tests/test_golden.py tests/test_loss.py

Each gets a new virtual environment (`--folder` keeps them: a second run installs nothing that is there), with the
libraries alone; the tests use this clone. What follows `--` goes to pytest. The table at the end has the versions and
pytest's own counts. pip installs PyPI's torch, with CUDA on Linux: 5 GB for each.
"""

import argparse
import configparser
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHOWN = ("torch", "transformers", "accelerate", "datasets", "huggingface_hub", "numpy")


def requirements() -> list[str]:
    """What setup.cfg asks for, with the tests' extra."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    text = config["options"]["install_requires"] + config["options.extras_require"]["test"]
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def lowest(requirement: str) -> str:
    """`torch>=2.11` -> `torch==2.11`. A marker after it is kept."""
    assert requirement.count(">=") == 1 and "," not in requirement, f"no single lower bound: {requirement}"
    return requirement.replace(">=", "==", 1)


def install(folder: Path, base: str, wanted: list[str]) -> Path:
    """The Python of a virtual environment in `folder`, made with the interpreter `base`, that has what is `wanted`."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([base, "-m", "venv", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", *wanted], check=True)
    return python


def run_tests(python: Path, arguments: list[str]) -> dict:
    """{"python", a version for each of SHOWN, "result": pytest's last line, "seconds", "failed": names of tests}."""
    names = f"import json, platform; from importlib.metadata import version; print(json.dumps({{'python': \
platform.python_version(), **{{name: version(name) for name in {SHOWN}}}}}))"
    found = json.loads(subprocess.run([python, "-c", names], check=True, capture_output=True, text=True).stdout)
    began = time.perf_counter()
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout)
    result = done.stdout.strip().splitlines()[-1].strip("= ") if done.stdout.strip() else f"exit {done.returncode}"
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return found | {"result": result, "seconds": round(time.perf_counter() - began), "failed": failed}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    base = {"metavar": "PYTHON", "nargs": "?", "const": sys.executable}
    parser.add_argument("--lowest", **base, help="run the lowest versions, in an environment of this Python's")
    parser.add_argument("--newest", **base, help="run the newest versions, likewise")
    parser.add_argument("--folder", type=Path, help="where the environments are kept")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("pytest", nargs="*", help="pytest's own arguments, after --")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("lowest", "newest"):
            if base := getattr(arguments, name):
                wanted = [lowest(line) if name == "lowest" else line for line in requirements()]
                python = install((arguments.folder or Path(temporary)) / name, base, wanted)
                results[name] = run_tests(python, arguments.pytest)
    print("| | Python | " + " | ".join(SHOWN) + " | result |\n" + "|---" * (3 + len(SHOWN)) + "|")
    for name, found in results.items():
        print(f"| {name} | " + " | ".join(found[key] for key in ("python", *SHOWN, "result")) + " |")
        print("".join(f"  {test}\n" for test in found["failed"]), end="")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(found["failed"] for found in results.values()))


if __name__ == "__main__":
    main()
