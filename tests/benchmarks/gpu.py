"""Everything about this loop that only a GPU can show, in one call.

python tests/benchmarks/gpu.py --minutes 9 --out FOLDER
python tests/benchmarks/gpu.py --minutes 9 --out FOLDER --only speed mfu
python tests/benchmarks/gpu.py --toy --out FOLDER           at toy size, on a CPU too

The parts (gpu_parts.py) run one after the other, the most important first, each in a process of its own with a time
limit. Those that no time is left for are named at the end. FOLDER gets results.json, which is written again after each
part, and a log for each run. No network is needed, and of the libraries only those that the package itself imports;
TRL's column needs trl and datasets. Exit status 0: all parts that ran hold.
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "true"}
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # looking for a GPU must not start CUDA: children are forked
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import gpu_parts  # noqa: E402

LIBRARIES = ("torch", "transformers", "accelerate", "tokenizers", "numpy")


def run_part(name: str, folder: Path, out: Path, toy: bool, seconds: float) -> dict:
    """{"holds", "figures", "seconds"} of a part, or {"holds": False, "error"}: it failed or took longer than that."""
    began, result = time.perf_counter(), out / f"{name}.json"
    child = os.fork()
    if not child:
        os.setsid()  # with all its children it is one group
        status = 1
        try:
            log = os.open(out / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            (folder / name).mkdir()
            holds, figures = getattr(gpu_parts, name)(gpu_parts.Bench(folder / name, toy))
            result.write_text(json.dumps({"holds": holds, "figures": figures}), encoding="utf-8")
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.perf_counter() - began > seconds:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"holds": False, "figures": {}, "error": f"not done after {seconds:.0f} s", "seconds": seconds}
        time.sleep(0.05)
    took = round(time.perf_counter() - began, 1)
    if result.is_file():
        return json.loads(result.read_text(encoding="utf-8")) | {"seconds": took}
    last = (out / f"{name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    return {"holds": False, "figures": {}, "error": "".join(last) or "no word", "seconds": took}


def table(results: dict) -> str:
    """A row for each figure of each part."""
    lines = ["| part | holds | s | figure | value |", "|---|---|---|---|---|"]
    for name, found in results.items():
        holds = {True: "yes", False: "NO", None: "-"}[found["holds"]]
        figures = found["figures"] | ({"error": found["error"]} if "error" in found else {})
        for number, (figure, value) in enumerate(figures.items()):
            first = f"| {name} | {holds} | {found['seconds']} " if number == 0 else "| | | "
            value = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
            lines.append(f"{first}| {figure} | {value} |")
    return "\n".join(lines)


def surroundings() -> dict:
    """Device and versions. Called when all parts are done: asking for the device starts CUDA."""
    import torch

    has_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name(0) if has_gpu else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="for all parts together")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and the logs")
    parser.add_argument("--only", nargs="+", choices=gpu_parts.PARTS, help="these parts alone")
    parser.add_argument("--toy", action="store_true", help="tiny models and few steps: shows that the parts run")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + 60 * arguments.minutes
    results, left_out = {}, []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder
        for name in arguments.only or gpu_parts.PARTS:
            left = deadline - time.perf_counter()
            if left < 5:
                left_out.append(name)
                continue
            limit = min(left, gpu_parts.PARTS[name])
            results[name] = run_part(name, Path(folder), arguments.out, arguments.toy, limit)
            found = {"parts": results, "left out": left_out, "toy": arguments.toy}
            (arguments.out / "results.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
            print(f"{name}: {results[name]}", flush=True)
    found = {"surroundings": surroundings(), "parts": results, "left out": left_out, "toy": arguments.toy}
    (arguments.out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n" + "  ".join(f"{name} {value}" for name, value in found["surroundings"].items()))
    print(table(results))
    if left_out:
        print(f"no time was left for: {' '.join(left_out)} (--only)")
    return int(any(part["holds"] is False for part in results.values()))


if __name__ == "__main__":
    sys.exit(main())
