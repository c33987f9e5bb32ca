"""What the tests share: tiny models of four families, a small text, and a way to run the real command."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

# no test reads or fills the user's caches, or asks a hub; the libraries read these when they are imported
CACHE = tempfile.mkdtemp(prefix="train_loop_tests_")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ |= {"HF_HOME": CACHE, "HF_HUB_OFFLINE": "1"}

ROOT = Path(__file__).parent.parent

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
