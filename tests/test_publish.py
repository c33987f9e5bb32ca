"""The model card: read back by the hub's own classes, and judged by the hub."""

import math
import re
import sys

import huggingface_hub
import pytest
from conftest import ONLINE, TINY, lines_of, run_program
from hub_server import HubServer
from huggingface_hub import ModelCard, metadata_load

from train_loop.main import main


@pytest.fixture(scope="module")
def runs(text_file, tmp_path_factory):
    """A run from scratch with every kind of perplexity, and one that continues from its folder with other data."""
    folder = tmp_path_factory.mktemp("runs")
    arguments = [*TINY, f"--train_file={text_file}", "--num_train_epochs=2", "--named_perplexities"]
    assert main([*arguments, f"--output_dir={folder}/first"]) == 0
    arguments = [f"--model_name_or_path={folder}/first", f"--train_file={text_file}", f"--validation_file={text_file}"]
    arguments += ["--block_size=32", "--max_train_steps=2", "--max_eval_samples=30", "--eval_stride=16"]
    assert main([*arguments, f"--output_dir={folder}/second"]) == 0
    return folder


def test_the_cards_metadata_has_the_last_evaluation(runs):
    data, last = ModelCard.load(runs / "first" / "README.md").data, lines_of(runs / "first")[-1]
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    results = {result.metric_type: result for result in data.eval_results}
    assert results.keys() == {"loss", "perplexity", "word_perplexity", "word_eos_perplexity", "bits_per_byte"}
    assert results["loss"].metric_value == pytest.approx(last["eval_loss"], abs=1e-6)  # six digits
    assert results["perplexity"].metric_value == pytest.approx(math.exp(last["eval_loss"]), rel=1e-6)
    assert (results["loss"].dataset_type, results["loss"].dataset_name) == ("text", "prose.txt")


def test_the_table_has_a_row_for_each_evaluation(runs):
    card = (runs / "first" / "README.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]*) \| ([\d.]+) \| ([\d.]+) \|$", card, re.M)
    evaluations = [line for line in lines_of(runs / "first") if "eval_loss" in line]
    assert [(int(step), float(epoch)) for step, epoch, *_ in rows] == [(e["step"], e["epoch"]) for e in evaluations]
    assert [loss for *_, loss, _ in rows] == [f"{e['eval_loss']:.4f}" for e in evaluations]
    assert rows[0][2] == "" and rows[-1][2] == f"{lines_of(runs / 'first')[-2]['loss']:.4f}"


def test_the_card_names_nothing_of_the_hub_that_is_not_there(runs):
    """A folder is not named as the base model, a file not as the data set, and no license is invented."""
    for name in ("first", "second"):
        assert metadata_load(runs / name / "README.md").keys() == {
            "library_name",
            "pipeline_tag",
            "tags",
            "model-index",
        }


def test_the_card_says_how_the_model_was_made_and_measured(runs):
    first, second = ((runs / name / "README.md").read_text() for name in ("first", "second"))
    assert "trained from random weights on prose.txt" in first and f"fine-tuned from `{runs}/first`" in second
    assert re.search(r"Validation on the last \d+ of [\d,]+ training rows .* after 26 optimizer steps: loss ", first)
    assert "training rows" not in second and "validation_split_percentage" not in second
    assert "begins anew every 32 tokens" in first and "a window that moves by 16" in second
    assert "- num_train_epochs: 2.0" in first and "- num_train_epochs" not in second
    assert "- learning_rate: 0.01" in first and "8 blocks = 256 tokens in a step" in first
    assert "- hardware: 1 process on " in first and re.search(r"^- versions: train_loop .*, torch 2\.", first, re.M)
    assert f'model="{runs}/first"' in first


@pytest.mark.skipif(int(huggingface_hub.__version__.split(".")[0]) < 2, reason="the client asks huggingface.co alone")
def test_the_hub_takes_the_card(runs, tmp_path):
    """The client sends it to the hub; a card that is broken is sent as well, and refused."""
    with HubServer(tmp_path / "hub", {}) as hub:
        for name in ("first", "second"):
            environment = hub.environment(tmp_path / "cache")
            done = run_program(
                "validates_card.py", runs / name / "README.md", launcher=(*ONLINE, sys.executable), **environment
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith("refused:") and "license" in done.stdout
        assert [status for _, path, status, _ in hub.requests if path == "/api/validate-yaml"] == [200, 400] * 2
