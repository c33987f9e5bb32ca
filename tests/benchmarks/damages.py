"""Damages what a run left in some 300 ways, runs the same command again, and looks at what comes out.

    python tests/benchmarks/damages.py

Each file of a finished run, of one that was killed, and of a finished one without checkpoints is in turn removed,
emptied, cut, changed in one bit, replaced by the same file of a run with another seed, and replaced by a folder; the
rest of the states have two such damages, drawn at random. The command must end in a sentence (exit status 1), or in a
run with the weights, the configuration and the metrics of the one that was left alone. A traceback, other weights, or a
lost whole checkpoint is a failure.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from events import attempt, load_libraries, prepare, result  # noqa: E402

DEEDS = ("removed", "emptied", "cut", "flipped", "foreign", "a folder")
VERIFIED = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "metrics.jsonl")


def damage(path, deed, foreign, generator):
    content = path.read_bytes()
    path.unlink()
    if deed == "a folder":
        path.mkdir()
    elif deed == "foreign":
        shutil.copy(foreign, path)
    elif deed != "removed":
        flipped = bytearray(content)
        flipped[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes({"emptied": b"", "cut": content[: len(content) // 2], "flipped": flipped}[deed])


def states(bases, wanted, generator):
    """(name of the base, [(file, deed), ...]) of each state: every file and deed alone, then pairs of them."""
    files = {name: sorted(p.relative_to(base) for p in base.rglob("*") if p.is_file()) for name, base in bases.items()}
    single = [(name, [(file, deed)]) for name in bases for file in files[name] for deed in DEEDS]
    generator.shuffle(single)
    pairs = []
    while len(single) + len(pairs) < wanted:
        name = generator.choice(list(bases))
        pairs.append((name, [(file, generator.choice(DEEDS)) for file in generator.sample(files[name], 2)]))
    return (single + pairs)[:wanted]


def harness(wanted, seconds, folder):
    """Goes through the states; returns the counts. Raises SystemExit at the first failure."""
    arguments, log, generator, place = prepare(folder), folder / "log.txt", random.Random(0), folder / "place" / "run"
    load_libraries(arguments, folder)
    arguments += ["--checkpoints_total_limit=3"]
    for name, more in ("foreign", ["--seed=1"]), ("finished", []):
        assert attempt([*arguments, *more], place, 1, log)[0] == [0], log.read_text()
        shutil.copytree(place, folder / name)
        shutil.rmtree(place)
    bases = {name: folder / name for name in ("finished", "killed", "without checkpoints")}
    expected = result(bases["finished"])
    shutil.copytree(bases["finished"], bases["killed"])
    shutil.rmtree(bases["killed"] / "checkpoints" / "step-000006")
    for name in ("all_results.json", "model.safetensors"):
        (bases["killed"] / name).unlink()
    shutil.copytree(bases["finished"], bases["without checkpoints"], ignore=shutil.ignore_patterns("checkpoints"))

    counts, began = {"states": 0, "right runs": 0, "sentences": 0}, time.monotonic()
    for name, damages in states(bases, wanted, generator):
        if time.monotonic() > began + seconds:
            break
        shutil.copytree(bases[name], place)
        for file, deed in damages:
            damage(place / file, deed, folder / "foreign" / file, generator)
        log.write_text("")
        (status,), _ = attempt(arguments, place, 1, log)
        said = log.read_text(errors="replace")
        where = f"{name}: {', '.join(f'{file} {deed}' for file, deed in damages)}; exit status {status}\n{said}"
        if status not in (0, 1) or "Traceback" in said or (status == 1 and "\nerror: " not in "\n" + said):
            raise SystemExit(where)
        if status == 0:
            found = result(place)
            other = [file for file in VERIFIED if found.get(file) != expected[file]]
            if other:
                raise SystemExit(f"other {other}; {where}")
        counts["states"] += 1
        counts["sentences" if status else "right runs"] += 1
        shutil.rmtree(place)
    return counts | {"tracebacks": 0, "other weights": 0, "seconds": round(time.monotonic() - began)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=3600, help="stop after so long")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="damages_"))
    os.environ |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print(json.dumps(harness(options.states, options.seconds, folder)))
    shutil.rmtree(folder)
