"""Several runs at once: the loops on the page run as they stand there, and the runs can be compared."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

PAGE = (ROOT / "train_loop" / "compare" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SHORT = "--max_train_steps 2 --max_eval_samples 20 --logging_steps 1 --num_threads 1"


def bash(script, folder, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(["bash", "-euc", script], cwd=folder, env=environment, capture_output=True, text=True)


def programs(folder, **scripts):
    """The PATH with these shell scripts in front."""
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_each_task_of_a_slurm_array_has_its_own_seed_and_folder(tmp_path):
    """launch_configs/slurm.sbatch with the page's arguments; srun prints what it would start."""
    (block,) = [block for block in BLOCKS if "sbatch" in block]
    path = programs(
        tmp_path / "bin",
        sbatch='shift; script=$1; shift; SLURM_ARRAY_TASK_ID=2 bash "$script" "$@"',
        srun='shift 5; echo "$@"',
        scontrol="echo n1",
    )
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_PER_TASK": "1"}
    done = bash(block, ROOT, PATH=path, **slurm)
    assert done.returncode == 0, done.stderr
    wanted = "main.py --config distilgpt2_wikitext2 --learning_rate {0} --seed 2 --output_dir runs/rate{0}-2 {1}"
    more = "--resume_from_checkpoint auto"
    assert done.stdout.splitlines() == [wanted.format(rate, more) for rate in ("2e-5", "1e-4")]


@pytest.mark.slow
def test_the_loops_on_the_page_run_as_written_and_a_second_time(healthy, tmp_path):
    """Two steps of each run. The second time they are finished already."""
    (tmp_path / "train_loop").symlink_to(ROOT / "train_loop")
    environment = healthy.environment(tmp_path / "cache") | {"PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    sweep, alone = (block.replace("main.py ", f"main.py {SHORT} ") for block in (BLOCKS[0], BLOCKS[2]))
    done = bash(sweep, tmp_path, **environment, HF_HUB_OFFLINE="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"rate(1e-4|2e-5)-\* is (lower|higher) than rate", " ".join(done.stdout.split()))
    again = bash(sweep, tmp_path, **environment, HF_HUB_OFFLINE="0")
    assert again.returncode == 0 and again.stdout.count("is finished: 2 steps") == 6
    done = bash(alone, tmp_path, **environment, HF_HUB_OFFLINE="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bits per byte" in done.stdout or "nats per token" in done.stdout
