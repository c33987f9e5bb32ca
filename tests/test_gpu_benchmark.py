"""The benchmark for GPUs, at toy size on a CPU: each part runs, and what it can show without a GPU holds."""

import json
import re

import pytest
from conftest import PROGRAMS, ROOT, run
from forks import forked

PARTS = re.findall(r'^    "(\w+)": \d+,$', (ROOT / "tests/benchmarks/gpu_parts.py").read_text(), re.MULTILINE)
QUICK = ["golden"]


@pytest.mark.parametrize(
    "parts", [QUICK, pytest.param([part for part in PARTS if part not in QUICK], marks=pytest.mark.slow)]
)
def test_a_part_runs_at_toy_size_and_comes_into_the_table(parts, tmp_path):
    assert len(PARTS) == 10
    arguments = ["tests/benchmarks/gpu.py", "--toy", "--minutes=9", f"--out={tmp_path}", "--only", *parts]
    done = run(*arguments, timeout=600, CUDA_VISIBLE_DEVICES="")
    found = json.loads((tmp_path / "results.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(found["parts"]) == parts and not found["left out"]
    assert all(part["holds"] is not False and part["figures"] for part in found["parts"].values())
    assert all(f"| {name} | " in done.stdout for name in parts)
    assert found["surroundings"]["torch"]


def test_a_part_that_takes_too_long_is_ended_and_reported(tmp_path):
    done = forked(PROGRAMS / "slow_part.py", tmp_path)
    assert "| slow | NO | 0.2 | error | not done after 0 s |" in done.stdout, done.stderr
