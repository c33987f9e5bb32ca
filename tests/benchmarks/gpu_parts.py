"""The parts of gpu.py. Each takes a `Bench` and returns (whether it holds, or None where it only measures; figures).

Runs are children of the part, so that each has its own memory and its own CUDA, and none waits for imports. Nothing
here may start CUDA, or compute, in the part's own process.
"""

import contextlib
import functools
import importlib.util
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

# some of these are imported here for the children's sake
import matplotlib.pyplot  # noqa: F401
import torch
from throughput import SHAPES, VOCAB, model_flops, prepare
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, Trainer, default_data_collator  # noqa: F401

import train_loop.publish
import train_loop.run  # noqa: F401
from train_loop.machine.flops import peak_flops
from train_loop.main import main

ROOT = Path(__file__).parents[2]
PARTS = {  # the most important first: seconds that each may take
    "golden": 60,
    "resume": 90,
    "syncs": 60,
    "speed": 300,
    "finite": 60,
    "memory": 120,
    "sharded": 120,
    "plan": 90,
    "recipe": 240,
    "speed_compiled": 300,
}
TOY_SHAPE, TOY_VOCAB = (2, 32, 2), 300


class Bench:
    """A folder, sizes, and a way to run things as children."""

    def __init__(self, folder: Path, toy: bool):
        self.folder, self.toy, self.has_gpu = folder, toy, torch.cuda.is_available()
        self.half = "bf16" if self.has_gpu and not toy else "no"

    def child(self, function, *arguments, **environment):
        """What `function(*arguments)` returns in a child with these variables in its environment. Raises RuntimeError
        where the child fails."""
        result = self.folder / "result.json"
        result.unlink(missing_ok=True)
        process = self.start(lambda: result.write_text(json.dumps(function(*arguments))), **environment)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if not result.is_file():
            raise RuntimeError(f"{function.__name__} ended with {status}")
        return json.loads(result.read_text())

    def start(self, function, **environment):
        """The process id of a child that calls `function`."""
        sys.stdout.flush()
        if process := os.fork():
            return process
        status = 1
        try:
            os.environ.update({name: str(value) for name, value in environment.items()})
            function()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def data(self, shape: str, num_blocks: int, block_size: int) -> Path:
        """A folder with a model of this shape with random weights, its tokenizer, and `num_blocks` of random tokens."""
        folder = self.folder / f"{shape}-{block_size}-{num_blocks}"
        if not folder.exists():
            folder.mkdir()
            sizes = (TOY_SHAPE, TOY_VOCAB) if self.toy else (SHAPES[shape], VOCAB)
            self.child(lambda: prepare(folder, num_blocks, block_size, *sizes))
        return folder

    def train(self, data: Path, output: str, *more, precision="no", **environment) -> tuple[int, list[dict], dict]:
        """(exit status, lines of metrics.jsonl, all_results.json) of a run over `data`, evaluated on two blocks."""
        words = [*self.words(data, output), *more]
        status = self.child(main, words, ACCELERATE_MIXED_PRECISION=precision, **environment)
        return status, lines_of(self.folder / output), results_of(self.folder / output)

    def words(self, data: Path, output: str) -> list[str]:
        block_size = data.name.split("-")[-2]
        return [
            *(f"--model_name_or_path={data}", f"--train_file={data}/data.txt", f"--validation_file={data}/data.txt"),
            *(f"--block_size={block_size}", f"--output_dir={self.folder / output}", "--max_eval_samples=2"),
            *("--checkpointing_steps=none", "--learning_rate=2e-5", "--weight_decay=0.01", "--traceback"),
        ]


def lines_of(output: Path) -> list[dict]:
    path = output / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def results_of(output: Path) -> dict:
    path = output / "all_results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def without_timings(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "mfu")} for line in lines]


def largest_gap(lines: list[dict], others: list[dict]) -> float:
    """The largest relative difference of two runs' losses."""
    losses = [[line.get("loss", line.get("eval_loss")) for line in run] for run in (lines, others)]
    return max(abs(a / b - 1) for a, b in zip(*losses, strict=True))


def golden(bench: Bench) -> tuple[bool, dict]:
    """The losses of eight steps in float32 on the GPU are those on the CPU. Tolerance: other kernels sum otherwise, and
    a loss of the eighth step has gone through seven updates."""
    data = bench.data("distilgpt2", 32, 64)
    more = ["--max_train_steps=8", "--logging_steps=1", "--per_device_train_batch_size=4", "--learning_rate=1e-3"]
    more += ["--num_threads=1"] if bench.toy else []
    make_plain(data)
    _, on_device, _ = bench.train(data, "device", *more)
    _, on_cpu, _ = bench.train(data, "cpu", *more, ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
    gap = largest_gap(on_device, on_cpu)
    return gap < 2e-4, {"largest relative difference of losses, GPU and CPU": gap}


def make_plain(data: Path) -> None:
    """Turns the model's dropout off, whose numbers differ between devices."""
    path, off = data / "config.json", {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | off))


def resume(bench: Bench) -> tuple[bool, dict]:
    """Killed in the middle of a step and resumed = never stopped, bit for bit, with dropout, under --deterministic."""
    steps, every = (8, 2) if bench.toy else (60, 10)
    data = bench.data("distilgpt2", 64, 64 if bench.toy else 128)
    more = ["--deterministic", f"--max_train_steps={steps}", "--logging_steps=1", f"--checkpointing_steps={every}"]
    more += ["--per_device_train_batch_size=4", "--checkpoints_total_limit=9", "--resume_from_checkpoint=auto"]
    _, alone, _ = bench.train(data, "alone", *more, precision=bench.half)
    words = [*bench.words(data, "killed"), *more]
    process = bench.start(lambda: main(words), ACCELERATE_MIXED_PRECISION=bench.half)
    killed_at = 0
    while killed_at < steps / 2 and os.waitpid(process, os.WNOHANG) == (0, 0):
        killed_at = max([0, *(line["step"] for line in lines_of(bench.folder / "killed"))])
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    was_killed = not results_of(bench.folder / "killed")
    _, resumed, _ = bench.train(data, "killed", *more, precision=bench.half)
    weights = [(bench.folder / name / "model.safetensors").read_bytes() for name in ("alone", "killed")]
    same = weights[0] == weights[1] and without_timings(alone) == without_timings(resumed)
    return same and was_killed, {"killed after step": killed_at, "same bits": str(same), "killed": str(was_killed)}


def syncs(bench: Bench) -> tuple[bool, dict]:
    """How often the host waits for the device in a step: what 10 more steps add to torch's warnings."""
    data = bench.data("distilgpt2", 80, 64)

    def count(steps):
        if bench.has_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            main([*bench.words(data, f"steps{steps}"), f"--max_train_steps={steps}", "--per_device_train_batch_size=4"])
        return [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]

    few, many = (bench.child(count, steps, ACCELERATE_MIXED_PRECISION=bench.half) for steps in (8, 18))
    where = sorted({place for place in many if many.count(place) > few.count(place)})
    return len(many) == len(few), {
        "waits in 10 steps": len(many) - len(few),
        "waits in all else": len(few),
        **({"where": " ".join(where)} if where else {}),
    }


def trainer(folder: Path, data: str, precision: str, batch: int, block_size: int, steps: int, sft: bool) -> dict:
    """{"seconds" of a step, "peak_gib", "loss"} of `transformers.Trainer`, or of TRL's SFTTrainer as it comes."""
    import numpy as np
    from transformers import TrainerCallback, TrainingArguments

    has_gpu = torch.cuda.is_available()
    synchronize = torch.cuda.synchronize if has_gpu else lambda: None
    blocks = torch.from_numpy(np.load(f"{data}/blocks.npy"))
    rows = [{"input_ids": block, "labels": block} for block in blocks]
    model = AutoModelForCausalLM.from_pretrained(data, dtype=torch.float32)
    model.loss_type = "ForCausalLM"  # counts a block's targets as it does for other models
    marks = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (steps // 2, steps):
                synchronize()
                marks[state.global_step] = time.perf_counter()

    options = {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "learning_rate": 2e-5,
        "logging_steps": steps // 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not has_gpu,
        "bf16": precision == "bf16",
        "tf32": True if precision == "tf32" else None,
    }
    if sft:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        rows = Dataset.from_dict({"input_ids": blocks.tolist()})
        made = SFTTrainer(
            model=model, args=SFTConfig(**options, max_length=block_size), train_dataset=rows, callbacks=[Clock()]
        )
    else:
        arguments = TrainingArguments(**options, weight_decay=0.01)
        made = Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator, callbacks=[Clock()]
        )
    made.train()
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    return {
        "seconds": (marks[steps] - marks[steps // 2]) / (steps - steps // 2),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if has_gpu else math.nan,
        "loss": float(losses[-1]),
    }


def ours(bench: Bench, data: Path, precision: str, batch: int, block_size: int, steps: int, compiled: bool) -> dict:
    """The same of this loop."""
    more = [f"--max_train_steps={steps}", f"--logging_steps={steps // 2}", f"--per_device_train_batch_size={batch}"]
    more += ["--tf32"] if precision == "tf32" else []
    environment = {"ACCELERATE_DYNAMO_BACKEND": "eager" if bench.toy else "inductor"} if compiled else {}
    half = "bf16" if precision == "bf16" else "no"
    output = f"ours-{data.name}-{precision}-{compiled}"
    _, lines, results = bench.train(data, output, *more, precision=half, **environment)
    last = [line for line in lines if "loss" in line][-1]
    seconds = batch * (block_size - 1) / last["tokens_per_second"]
    return {"seconds": seconds, "peak_gib": results.get("peak_device_memory_gib", math.nan), "loss": last["loss"]}


def speed(bench: Bench, compiled: bool = False) -> tuple[bool | None, dict]:
    """Tokens per second and peak memory against Trainer at the same precision, and TRL's SFTTrainer as it comes.
    Holds: 1.3 times Trainer's tokens and half its memory in bf16 at distilgpt2's shape, 0.45 of the device's peak at
    gpt2-medium's."""
    holds, figures = True, {}
    cases = [("gpt2-medium", 8, 1024), ("distilgpt2", 32, 128)]
    for shape, batch, block_size in [(s, 2, 32) for s, _, _ in cases] if bench.toy else cases:
        steps = 4 if bench.toy else 40
        data = bench.data(shape, batch * steps, block_size)
        for precision in ("float32",) if bench.toy or not bench.has_gpu else ("bf16", "tf32"):
            size = (precision, batch, block_size, steps)
            runs = {"ours": ours(bench, data, *size, compiled)}
            if not compiled:
                runs["Trainer"] = bench.child(trainer, bench.folder, str(data), *size, False)
                if importlib.util.find_spec("trl") and importlib.util.find_spec("datasets"):
                    runs["SFTTrainer"] = bench.child(trainer, bench.folder, str(data), *size, True)
            of = f"{shape} {batch} x {block_size} {precision}{' compiled' * compiled}"
            for name, run in runs.items():
                figures[f"{of}: {name}, tokens/s"] = batch * (block_size - 1) / run["seconds"]
                figures[f"{of}: {name}, GiB"] = run["peak_gib"]
            for name in list(runs)[1:]:
                faster = runs[name]["seconds"] / runs["ours"]["seconds"]
                smaller = runs["ours"]["peak_gib"] / runs[name]["peak_gib"]
                figures |= {f"{of}: ours / {name}, tokens/s": faster, f"{of}: ours / {name}, memory": smaller}
                if (shape, precision, name) == ("distilgpt2", "bf16", "Trainer"):
                    holds &= faster >= 1.3 and smaller <= 0.5
            if bench.has_gpu and not bench.toy:
                peak = bench.child(peak_of, precision)
                if peak:
                    mfu = model_flops(batch, block_size, SHAPES[shape]) / runs["ours"]["seconds"] / peak
                    figures[f"{of}: ours, mfu"] = mfu
                    if (shape, precision) == ("gpt2-medium", "bf16"):
                        holds &= mfu >= 0.45
    return (None if bench.toy or not bench.has_gpu or compiled else holds), figures


def peak_of(precision: str) -> float | None:
    return peak_flops(torch.device("cuda", 0), "bf16" if precision == "bf16" else "no", precision == "tf32")


speed_compiled = functools.partial(speed, compiled=True)


def finite(bench: Bench) -> tuple[bool, dict]:
    """float16's scaler takes steps and lowers the loss; a step that is not finite ends the run before it is taken."""
    data = bench.data("distilgpt2", 80, 64)
    more = ["--max_train_steps=20", "--logging_steps=1", "--per_device_train_batch_size=4", "--learning_rate=1e-3"]
    half = "fp16" if bench.has_gpu else "no"
    status, lines, _ = bench.train(data, "fp16", *more, precision=half)
    losses = [line["loss"] for line in lines if "loss" in line]
    more[-1] = "--learning_rate=1e30"
    bad_words = [word for word in (*bench.words(data, "bad"), *more) if word != "--traceback"]
    bad = bench.child(main, bad_words, ACCELERATE_MIXED_PRECISION=bench.half)
    exported = (bench.folder / "bad" / "model.safetensors").exists()
    holds = status == 0 and losses[-1] < losses[0] and bad == 1 and not exported
    return holds, {
        f"loss in {half}, first step": losses[0],
        f"loss in {half}, step 20": losses[-1],
        "exit status of a run that is not finite": bad,
    }


def memory(bench: Bench) -> tuple[bool, dict]:
    """--auto_micro_batch where memory really runs out: the blocks of a step stay the same. A CPU has no such end."""
    blocks, block_size = (16, 32) if bench.toy else (1024, 1024)
    data = bench.data("gpt2-medium", blocks, block_size)
    more = ["--max_train_steps=2", "--logging_steps=1", f"--per_device_train_batch_size={blocks}", "--auto_micro_batch"]
    status, _, results = bench.train(data, "auto", *more, precision=bench.half)
    log = Path(os.readlink("/proc/self/fd/1"))
    sizes = re.findall(r"micro-batch (\d+) x accumulation (\d+)", log.read_text() if log.is_file() else "")
    micro_batch, accumulation = map(int, sizes[-1]) if sizes else (0, 0)
    ran_out = micro_batch < blocks
    holds = status == 0 and micro_batch * accumulation == blocks and (ran_out or bench.toy)
    peak = results.get("peak_device_memory_gib", math.nan)
    return holds, {"micro-batch found": micro_batch, "accumulation": accumulation, "peak, GiB": peak}


def sharded(bench: Bench) -> tuple[bool, dict]:
    """FSDP2 on one device, by the launcher, beside the plain way, in float32. Tolerance: other kernels."""
    data = bench.data("distilgpt2", 32, 64)
    make_plain(data)
    more = ["--max_train_steps=4", "--logging_steps=1", "--per_device_train_batch_size=4"]
    config = ROOT / "launch_configs" / ("fsdp.yaml" if bench.has_gpu else "cpu.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes=1"]
    words = ["--mixed_precision=no", "-m", "train_loop.main", *bench.words(data, "sharded"), *more]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    subprocess.run([*map(str, launch), *words], check=True, env={**os.environ, "PYTHONPATH": path})
    _, plain, _ = bench.train(data, "plain", *more)
    gap = largest_gap(lines_of(bench.folder / "sharded"), plain)
    return gap < 1e-4, {"largest relative difference of losses": gap}


def plan(bench: Bench) -> tuple[bool | None, dict]:
    """What --dry_run says of memory and time, beside the run."""
    steps, batch, block_size = (8, 2, 32) if bench.toy else (60, 32, 128)
    data = bench.data("distilgpt2", batch * steps, block_size)
    more = [f"--max_train_steps={steps}", "--logging_steps=1", f"--per_device_train_batch_size={batch}"]
    bench.train(data, "planned", *more, "--dry_run", precision=bench.half)
    log = Path(os.readlink("/proc/self/fd/1"))
    text = log.read_text() if log.is_file() else ""
    counted, planned = re.search(r"counted ([\d.]+ \w+) at the peak", text), re.search(r"time +([\d.]+) s a step", text)
    _, lines, results = bench.train(data, "run", *more, precision=bench.half)
    rates = [line["tokens_per_second"] for line in lines if "loss" in line]
    step = batch * (block_size - 1) / statistics.median(rates[len(rates) // 2 :])
    gib = float(counted[1].split()[0]) / (1 if "GiB" in counted[1] else 2**30 / 1e6)
    peak = results.get("peak_device_memory_gib", results["peak_memory_gib"])
    figures = {"counted / peak memory": gib / peak, "planned / measured seconds a step": float(planned[1]) / step}
    return None if bench.toy else all(0.8 < value < 1.25 for value in figures.values()), figures


def recipe(bench: Bench) -> tuple[bool, dict]:
    """The reference recipe's shape from end to end: 18,666 blocks of 128 tokens, batch 32, 6 epochs, 3,504 steps, an
    evaluation on 1,931 blocks and a checkpoint after each epoch. Random weights and tokens."""
    blocks, batch, epochs = (16, 4, 2) if bench.toy else (18_666, 32, 6)
    data = bench.data("distilgpt2", blocks, 32 if bench.toy else 128)
    more = [f"--num_train_epochs={epochs}", f"--per_device_train_batch_size={batch}", "--logging_steps=100"]
    more += [f"--per_device_eval_batch_size={batch}", f"--max_eval_samples={4 if bench.toy else 1931}"]
    began = time.perf_counter()
    status, _, results = bench.train(data, "recipe", *more, "--checkpointing_steps=epoch", precision=bench.half)
    minutes = (time.perf_counter() - began) / 60
    return status == 0 and results["step"] == epochs * math.ceil(blocks / batch), {
        "minutes in all": minutes,
        "steps": results["step"],
        "tokens/s": results["tokens_per_second"],
    }
