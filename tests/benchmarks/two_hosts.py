"""One process, two on one machine, and two hosts, on the same batches: losses, tokens per second, and what is sent.

    python tests/benchmarks/two_hosts.py --repeats 3          # needs root; the hosts are network namespaces

The quickstart's model without dropout. An optimizer step has 16 blocks of 128 tokens, or 64 with accumulation 4. The
time of a step is the lower quartile over all repeats, which take turns: others may use the machine, too. The bytes are
those that the interface counts between two steps, their median. The share of communication is 1 - (a step without the
exchange of gradients) / (a step), from runs in which every other step leaves it out.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from hosts import launch_on_both, two_hosts  # noqa: E402

ARRANGEMENTS = {  # processes, threads of each
    "1 process, 2 threads": (1, 2),
    "1 process, 1 thread": (1, 1),
    "2 processes, 1 thread each": (2, 1),
    "2 hosts, 1 process of 1 thread each": (2, 1),
}
TOKENS_OF_A_STEP = 16 * 127


def measure(pair, folder, name, accumulation, exchange="every step", num_steps=12):
    """(losses, [what was seen between two steps of the first process: {"seconds", "sent" bytes}])"""
    output_dir, script = folder / "run", ROOT / "tests" / "programs" / "watches_the_wire.py"
    shutil.rmtree(output_dir, ignore_errors=True)
    for path in folder.glob("seen.*"):
        path.unlink()
    num_processes, num_threads = ARRANGEMENTS[name]
    no_dropout = "resid_pdrop=0,embd_pdrop=0,attn_pdrop=0"
    arguments = [
        "--config=quickstart",
        "--optimizer=adamw",
        "--learning_rate=1e-3",
        f"--config_overrides=n_layer=4,n_head=4,n_embd=256,n_positions=256,{no_dropout}",
        f"--per_device_train_batch_size={16 // num_processes}",
        f"--gradient_accumulation_steps={accumulation}",
        f"--num_threads={num_threads}",
        f"--max_train_steps={num_steps}",
        "--max_eval_samples=32",
        "--logging_steps=1",
        "--checkpointing_steps=none",
        f"--output_dir={output_dir}",
    ]
    environment = {"PYTHONPATH": str(ROOT), "SEEN": f"{folder}/seen", "EXCHANGE": exchange}
    if name.startswith("2 hosts"):
        flags = ["--num_processes=2", "--mixed_precision=no"]
        finished = launch_on_both(pair, flags, arguments, script, **environment)
    else:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", "launch_configs/multi_cpu.yaml"]
        command = [sys.executable, *(launcher if num_processes == 2 else []), script, *arguments]
        environment = {**os.environ, **environment}
        finished = [subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)]
    if any(process.returncode for process in finished):
        raise SystemExit("\n".join(process.stderr for process in finished))
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    seen = [json.loads(line) for line in (folder / "seen.0").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], [
        {key: b[key] - a[key] for key in a} for a, b in pairwise(seen)
    ]


def time_of(between):
    """Seconds of a step: their lower quartile."""
    return quantiles([step["seconds"] for step in between], n=4)[0]


def harness(repeats, folder):
    """Prints a row for each arrangement of processes."""
    print("| | accumulation | tokens/s | largest difference of a loss | sent in a step, MB | share of communication |")
    print("|---|---|---|---|---|---|")
    with two_hosts() as pair:
        for accumulation in (1, 4):
            runs, alternating = {name: [] for name in ARRANGEMENTS}, {name: [] for name in ARRANGEMENTS}
            for _ in range(repeats):
                for name, (num_processes, _) in ARRANGEMENTS.items():
                    runs[name].append(measure(pair, folder, name, accumulation))
                    if num_processes == 2:
                        _, between = measure(pair, folder, name, accumulation, "every other step", 22)
                        alternating[name] += between  # 21 steps, the first and the last without it
            expected, _ = runs["1 process, 2 threads"][0]
            for name in ARRANGEMENTS:
                losses, between = runs[name][0]
                seconds = time_of([step for _, between in runs[name] for step in between])
                difference = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
                row = [name, accumulation, f"{accumulation * TOKENS_OF_A_STEP / seconds:,.0f}", f"{difference:.1e}"]
                row += [f"{median(step['sent'] for step in between) / 1e6:.3f}" if "hosts" in name else ""]
                without, exchanged = (
                    [step for i, step in enumerate(alternating[name]) if i % 21 % 2 == odd] for odd in (0, 1)
                )
                share = 1 - time_of(without) / time_of(exchanged) if without else 0
                row += [f"{share:.1%} of {time_of(exchanged):.3f} s" if without else ""]
                print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="two_hosts_"))
    os.environ |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    harness(options.repeats, folder)
    shutil.rmtree(folder)
