"""What the tests share: tiny models of four families, a small text, and a way to run the real command."""

import atexit
import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from forks import forked
from hub_server import HubServer
from matplotlib.colors import to_rgb
from safetensors.torch import load_file

# no test reads or fills the user's caches, or asks a hub; the libraries read these when they are imported
CACHE = tempfile.mkdtemp(prefix="train_loop_tests_")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
assert "huggingface_hub" not in sys.modules, "an import above loads huggingface_hub: the next line comes too late"
os.environ |= {"HF_HOME": CACHE, "HF_HUB_OFFLINE": "1"}

ROOT = Path(__file__).parent.parent
PROGRAMS = ROOT / "tests" / "programs"

VOCAB, BLOCK = 97, 16  # of the blocks below

# a small width; the names that each family gives to its sizes
TINY_CONFIGS = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64},
    "llama": {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    },
    "gpt_neox": {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    },
    "opt": {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "max_position_embeddings": 64,
    },
}

# the same for configs
WITHOUT_DROPOUT = {"gpt2": {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}, "llama": {}}

# the arguments of a run of 100 blocks, 13 steps an epoch; threads would only wait for each other
TINY = [
    "--model_type=gpt2",
    "--config_overrides=n_layer=1,n_head=2,n_embd=32,n_positions=64",
    "--tokenizer_vocab_size=300",
    "--block_size=32",
    "--learning_rate=1e-2",
    "--max_train_samples=100",
    "--max_eval_samples=30",
    "--logging_steps=5",
    "--num_threads=1",
]
NO_DROPOUT = "--config_overrides=n_layer=1,n_head=2,n_embd=32,n_positions=64,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0"

LAUNCH = (sys.executable, "-m", "accelerate.commands.launch")
TWO = (*LAUNCH, "--config_file", ROOT / "launch_configs" / "multi_cpu.yaml")
ONLINE = ("env", "-u", "HF_HUB_OFFLINE")  # a process without the variable that keeps the tests off any hub
TOKEN, READ_TOKEN = "hf_writewritewrite", "hf_readreadread"
EXPORTED = {  # what a finished run leaves in its folder, beside its checkpoints
    "README.md",
    "all_results.json",
    "config.json",
    "evaluations",
    "generation_config.json",
    "loss_curve.png",
    "metrics.jsonl",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "train_config.yaml",
}
DATA_CARD = """---
language:
- en
license:
- cc-by-sa-3.0
- gfdl
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - {split: test, path: wikitext-2-raw-v1/test-*}
  - {split: train, path: wikitext-2-raw-v1/train-*}
  - {split: validation, path: wikitext-2-raw-v1/validation-*}
---
# A small stand-in
"""


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """40 kB of English prose, a line a row, blank lines among them."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("".join(topics[name] for name in sorted(topics))[:40_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def blocks():
    """22 blocks of a language with something to learn: each token mostly determines the next."""
    generator = np.random.default_rng(0)
    successor = generator.permutation(VOCAB)
    rows = np.empty((22, BLOCK), dtype=np.int32)
    rows[:, 0] = generator.integers(VOCAB, size=22)
    for t in range(1, BLOCK):
        rows[:, t] = np.where(generator.random(22) < 0.8, successor[rows[:, t - 1]], generator.integers(VOCAB, size=22))
    return rows


@pytest.fixture(scope="session")
def two_texts(tmp_path_factory):
    """A folder with long.txt and short.txt, of words that only one of them has, valid.txt, and a tokenizer for them."""
    from train_loop.data.rows import Rows
    from train_loop.model import load_tokenizer
    from train_loop.settings import Settings

    folder, generator = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for name, letters, size in (("long", "abcdef", 1200), ("short", "uvwxyz", 150)):
        words = ["".join(word) for word in generator.choice(list(letters), (size, 8))]
        (folder / f"{name}.txt").write_text("".join(f"{word}\n" for word in words))
    (folder / "valid.txt").write_text("abc uvw\n" * 40)
    rows = Rows.of(["abcdefuvwxyz\n"])
    load_tokenizer(Settings(tokenizer_vocab_size=257), rows).save_pretrained(folder / "tokenizer")
    return folder


def save_model(folder, text_file, model_type="gpt2", num_tokens=300, **values):
    """Leaves a tiny model with random weights in `folder`, with a tokenizer of its own. `values` go into its config."""
    import datasets
    from transformers import AutoConfig, AutoModelForCausalLM

    from train_loop.model import load_tokenizer
    from train_loop.settings.settings import Settings

    rows = datasets.Dataset.from_dict({"text": text_file.read_text(encoding="utf-8").splitlines(keepends=True)})
    tokenizer = load_tokenizer(Settings(tokenizer_vocab_size=num_tokens), rows)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    values = {"bos_token_id": 0, "eos_token_id": 0, **TINY_CONFIGS[model_type], **values}
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **values)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def parquet(rows):
    """The bytes of a file with these rows."""
    import datasets

    buffer = io.BytesIO()
    datasets.Dataset.from_list(rows).to_parquet(buffer)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def hub(text_file, tmp_path_factory):
    """A hub with small stand-ins for what the reference recipe asks for: a GPT-2 with a byte-level BPE tokenizer, which
    is found under its old name, and some prose in the files and the columns of WikiText."""
    import datasets
    from chat_templates import CHATML
    from transformers import AutoConfig, AutoModelForCausalLM

    from train_loop.model import load_tokenizer
    from train_loop.settings.settings import Settings

    folder = tmp_path_factory.mktemp("hub")
    lines = text_file.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [{"text": "" if line.isspace() else f" {line}"} for line in lines]
    model = folder / "model"
    load_tokenizer(Settings(tokenizer_vocab_size=400), datasets.Dataset.from_list(rows)).save_pretrained(model)
    sizes = {**TINY_CONFIGS["gpt2"], "n_positions": 256}
    config = AutoConfig.for_model("gpt2", vocab_size=400, bos_token_id=0, eos_token_id=0, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    (model / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A small stand-in\n")
    splits = {"train": rows[:-80], "validation": rows[-80:-40], "test": rows[-40:]}
    files = {f"wikitext-2-raw-v1/{name}-00000-of-00001.parquet": parquet(part) for name, part in splits.items()}
    aliases = {"distilgpt2": "distilbert/distilgpt2"}
    with HubServer(folder / "hub", {TOKEN: "write", READ_TOKEN: "read"}, aliases) as server:
        server.add("models", "distilbert/distilgpt2", {path.name: path.read_bytes() for path in model.iterdir()})
        chats = {path.name: path.read_bytes() for path in model.iterdir()} | {"chat_template.jinja": CHATML.encode()}
        server.add("models", "HuggingFaceTB/SmolLM2-135M-Instruct", chats)
        server.add("datasets", "Salesforce/wikitext", {"README.md": DATA_CARD.encode(), **files})
        yield server


@pytest.fixture
def healthy(hub):
    """The hub. After the test it is reset: it fails no more, and nothing is pushed to it."""
    yield hub
    hub.reset()


@pytest.fixture(scope="session")
def nobody_there():
    """The address of a hub out of reach: a port of this machine that is taken, and where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(scope="session")
def watched(text_file, tmp_path_factory):
    """Runs that memorise eight blocks, so that the validation loss soon rises: 40 steps with an evaluation every second
    one, and a checkpoint every fifth. {"folder", "arguments", "outputs": of each attempt in turn, "errors"}. Of several
    processes that run tests one makes them, and the others wait for it.

    folder/alone: everything on, left alone; the best is that of step 12. folder/killed: the same, killed in step 18 and
    once more in step 17, each time after the checkpoint of step 15. folder/plain: without what must have no effect, and
    with a tracker that loses its store.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    with FileLock(shared / "watched.lock"):
        record = shared / "watched.json"
        if not record.exists():
            (shared / "watched").mkdir()
            record.write_text(json.dumps(make_watched(shared / "watched", text_file)))
    found = json.loads(record.read_text())
    return found | {"folder": Path(found["folder"])}


def make_watched(folder, text_file):
    common = [
        "--model_type=gpt2",
        "--config_overrides=n_layer=1,n_head=2,n_embd=32,n_positions=64",
        "--tokenizer_vocab_size=300",
        "--block_size=32",
        "--max_train_samples=8",
        "--max_eval_samples=30",
        "--num_train_epochs=40",
        "--learning_rate=1e-2",
        "--logging_steps=1",
        "--eval_steps=2",
        "--checkpointing_steps=5",
        "--num_threads=1",
        f"--train_file={text_file}",
    ]
    arguments = [*common, "--load_best_model_at_end", "--early_stopping_patience=6", "--checkpoints_total_limit=1"]
    arguments += ["--sample_prompt=The value", "--report_to", "tensorboard", "mlflow"]
    alone, killed, plain = (f"--output_dir={folder}/{name}" for name in ("alone", "killed", "plain"))
    resumed = [*arguments, killed, "--resume_from_checkpoint=auto"]
    attempts = [
        {"arguments": [*arguments, alone], "store": f"{folder}/alone.mlflow"},
        {"arguments": [*arguments, killed], "store": f"{folder}/killed.mlflow", "dies_at": 18},
        {"arguments": resumed, "store": f"{folder}/killed.mlflow", "dies_at": 17},
        {"arguments": resumed, "store": f"{folder}/killed.mlflow"},
        {
            "arguments": [*common, plain, "--checkpoints_total_limit=9", "--report_to=mlflow"],
            "store": f"{folder}/plain.mlflow",
            "loses_its_store_at": 6,
        },
    ]
    environment = {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = forked(PROGRAMS / "watched.py", json.dumps(attempts), timeout=600, **environment)
    outputs = done.stdout.split("::\n")[1:]
    statuses = [int(output.split()[-1]) for output in outputs]
    assert statuses == [0, -9, -9, 0, 0], done.stdout + done.stderr
    return {"folder": str(folder), "arguments": arguments, "outputs": outputs, "errors": done.stderr}


def shows(picture, colour):
    """Whether some hundred pixels of a picture, [height, width, 4], have a colour: a line does."""
    return (np.abs(picture[..., :3] - to_rgb(colour)).max(-1) < 0.02).sum() > 100


def make_model(model_type="gpt2", dropout=False):
    """A tiny model for the blocks of the fixture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, **TINY_CONFIGS[model_type])
    for name, value in ({} if dropout else WITHOUT_DROPOUT[model_type]).items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def train(model, train_blocks, eval_blocks, output_dir, accelerator=None, clock=None, **values):
    """Runs the loop. Blocks are an array or a `Split`; those of evaluation may be {name: blocks}. Returns the loop's
    lines of training, its last evaluation, and the final weights."""
    from accelerate import Accelerator

    from train_loop import loop
    from train_loop.checkpoint import Checkpoints
    from train_loop.data import Split
    from train_loop.optim import build_optimizer, build_scheduler
    from train_loop.position import Position
    from train_loop.process.stop import StopSignal
    from train_loop.report import Metrics
    from train_loop.services import Services
    from train_loop.settings import Settings

    values = {
        "checkpointing_steps": "none",
        "logging_steps": 1,
        "num_train_epochs": 1.0,
        "learning_rate": 1e-3,
    } | values
    settings = Settings(output_dir=str(output_dir), **values)
    output_dir.mkdir()
    eval_blocks = eval_blocks if isinstance(eval_blocks, dict) else {"validation": eval_blocks}
    as_split = lambda blocks: blocks if isinstance(blocks, Split) else Split("blocks", blocks)  # noqa: E731
    train_split, eval_splits = as_split(train_blocks), {name: as_split(b) for name, b in eval_blocks.items()}
    accelerator = accelerator or Accelerator(cpu=True)
    torch.set_num_threads(1)  # more would only wait for each other, and where cores are busy, long
    torch.manual_seed(settings.seed)
    num_steps = settings.num_steps(train_split.blocks_in_epoch(settings), 1)
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, settings))
    metrics = Metrics(output_dir, num_steps, is_main=True)
    position = Position()
    checkpoints = Checkpoints(settings, accelerator, clock=clock)
    with StopSignal() as stop:
        loop.train(
            model=prepared,
            optimizer=optimizer,
            scheduler=build_scheduler(optimizer, settings, num_steps),
            position=position,
            train_split=train_split,
            eval_splits=eval_splits,
            settings=settings,
            services=Services(accelerator, metrics, checkpoints, stop),
        )
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], position.evaluation, model.state_dict()


def run(*arguments, launcher=(sys.executable,), timeout=300, **environment):
    """Runs a command from the repository's root; returns the finished process with its output as text."""
    return subprocess.run(
        [*launcher, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


def run_program(name, *arguments, **options):
    """Runs a program of tests/programs as `run` does; it imports the package of this checkout."""
    return run(PROGRAMS / name, *arguments, **{"PYTHONPATH": str(ROOT), **options})


@contextlib.contextmanager
def largest_file(size):
    """Inside it this process cannot write larger files: a longer write fails as on a full disk (EFBIG, not ENOSPC)."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def lines_of(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def without_timings(output_dir):
    """The lines of metrics.jsonl without timings, which differ between two runs of the same job."""
    lines = lines_of(output_dir)
    for line in lines:
        line.pop("tokens_per_second", None)
    return lines


def copy_until(step, reference, folder):
    """The folder of a finished run as a kill after this step would have left it."""
    shutil.copytree(reference, folder)
    for later in folder.glob("checkpoints/step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    for name in ("model.safetensors", "all_results.json"):
        (folder / name).unlink()


def weights_of(output_dir):
    return load_file(output_dir / "model.safetensors")


def largest_difference(first, second):
    """The largest difference between the numbers of two state dicts."""
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def assert_same_run(output_dir, reference):
    """Weights bit for bit, and the lines of metrics.jsonl but for their timings."""
    lines, wanted = without_timings(output_dir), without_timings(reference)
    for line, expected in zip(lines, wanted, strict=False):
        said = [
            f"{name} is {line.get(name)}, should be {expected.get(name)}"
            for name in expected | line
            if line.get(name) != expected.get(name)
        ]
        assert not said, f"a run is not the one that it must equal: in step {line['step']} {', '.join(said)}"
    assert len(lines) == len(wanted), f"a run has {len(lines)} lines of metrics.jsonl, and the same run {len(wanted)}"
    nats = [(folder / "evaluations" / "block_nats.safetensors").read_bytes() for folder in (output_dir, reference)]
    assert nats[0] == nats[1], "a run is not the one that it must equal: same metrics, but other nats of blocks"
    first, second = weights_of(output_dir), weights_of(reference)
    different = [name for name in first.keys() | second.keys() if not torch.equal(first.get(name), second.get(name))]
    assert not different, f"a run is not the one that it must equal: same metrics, but other weights in {different}"


def assert_lines_agree(lines, expected, rel=1e-5):
    """Lines of metrics.jsonl with the same names, and each number within `rel`: sums in another order, in float32."""
    for line, wanted in zip(lines, expected, strict=True):
        assert line == pytest.approx(wanted, rel=rel), f"the line {line} should be {wanted}, within a share of {rel}"


def pytest_terminal_summary(terminalreporter):
    """What was broken, in words: the claim of each test that failed, and why it is thought to be false."""
    failed = [report for report in terminalreporter.stats.get("failed", []) if hasattr(report.longrepr, "reprcrash")]
    if failed:
        terminalreporter.section("what was broken")
    for report in failed:
        name, _, case = report.nodeid.split("::")[-1].partition("[")
        reason = report.longrepr.reprcrash.message.removeprefix("AssertionError: ").partition("\nassert ")[0]
        terminalreporter.line(f"- no longer true: {name.removeprefix('test_').replace('_', ' ')}")
        terminalreporter.line(f"  ({report.nodeid.split('::')[0]}{', ' + case.rstrip(']') if case else ''})")
        terminalreporter.line("  " + "\n  ".join(reason.splitlines()[:12]))
