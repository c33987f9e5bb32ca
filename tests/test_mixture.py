"""Several sources of training rows: which blocks an epoch takes, in any number of processes, and after a resume."""

import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import (
    NO_DROPOUT,
    PROGRAMS,
    ROOT,
    TINY,
    assert_lines_agree,
    assert_same_run,
    copy_until,
    lines_of,
    without_timings,
)
from forks import forked

from train_loop.data import blocks as data
from train_loop.data import sources
from train_loop.data.blocks import Split, load_split
from train_loop.data.inputs import load_sources, load_training
from train_loop.data.mixture import JoinedBlocks, Mixture
from train_loop.data.rows import Rows, load_rows
from train_loop.errors import UserError
from train_loop.main import main
from train_loop.model import load_tokenizer
from train_loop.position import Place
from train_loop.settings import Settings, sources_of, validation_sets_of, weights_of
from train_loop.settings.command_line import read_settings
from train_loop.settings.sources import OF_TRAINING

plain_order = data.block_order
T = 8
SHARES = {"a": 0.7, "b": 0.3}
MODEL = ["--model_name_or_path=m", "--output_dir=o"]


def process(rank=0, world_size=1):
    return SimpleNamespace(
        num_processes=world_size, process_index=rank, device=torch.device("cpu"), is_main_process=rank == 0
    )


ALONE = process()


def numbered(first, size):
    """Blocks that say who they are: each of one token, its number."""
    return Split("training", np.arange(first, first + size, dtype=np.int32)[:, None].repeat(T, axis=1))


def mixture(size_a=200, size_b=30, shares=SHARES):
    """Blocks 0 to 199 are a's, 200 to 229 b's."""
    return Mixture({"a": numbered(0, size_a), "b": numbered(size_a, size_b)}, shares)


SETTINGS = Settings(per_device_train_batch_size=3, gradient_accumulation_steps=2)


def numbers_of(windows):
    """The numbers of the blocks in each window, without those that fill up the last one."""
    return [
        w.tensors["labels"].flatten(0, 1)[:, 0][w.tensors["labels"].flatten(0, 1)[:, 0] != -100].tolist()
        for w in windows
    ]


def epoch_of(split, epoch, accelerator=ALONE):
    return [number for window in numbers_of(split.windows(Place(epoch), SETTINGS, accelerator)) for number in window]


# prepared


def test_an_epoch_has_70_and_30_percent_and_ends_with_the_source_that_is_used_up_first():
    """b has 30 blocks, so an epoch has 100: all of b, 70 of a, and none twice."""
    split = mixture()
    assert split.num_blocks == split.blocks_in_epoch(42) == 100
    for epoch in range(3):
        numbers = epoch_of(split, epoch)
        assert len(numbers) == len(set(numbers)) == 100
        assert sum(number < 200 for number in numbers) == 70 and set(range(200, 230)) <= set(numbers)


def test_a_larger_source_gives_another_part_in_each_epoch_until_all_of_it_has_come():
    """200 blocks, 70 an epoch: after 20 epochs each has come 7 times."""
    counts = np.bincount(np.concatenate([epoch_of(mixture(), epoch) for epoch in range(20)]), minlength=230)
    assert (counts[:200] == 7).all() and (counts[200:] == 20).all()
    first, second = (set(epoch_of(mixture(), epoch)) for epoch in (0, 1))
    assert all(number >= 200 for number in first & second)


def test_an_epoch_is_a_function_of_seed_and_epoch_and_mixes_the_sources():
    assert epoch_of(mixture(), 1) == epoch_of(mixture(), 1) != epoch_of(mixture(), 2)
    other = dataclasses.replace(SETTINGS, seed=1)
    assert numbers_of(mixture().windows(Place(1), other, process())) != numbers_of(
        mixture().windows(Place(1), SETTINGS, process())
    )
    halves = np.array(epoch_of(mixture(), 0)).reshape(2, 50) >= 200
    assert all(5 < half.sum() < 25 for half in halves)


def test_from_each_place_come_the_windows_that_are_left():
    whole = list(mixture().windows(Place(1), SETTINGS, process()))
    assert len(whole) == 17
    for number, window in enumerate(whole, start=1):
        rest = list(mixture().windows(Place(**json.loads(json.dumps(vars(window.end)))), SETTINGS, process()))
        assert numbers_of(rest) == numbers_of(whole[number:])
    resumed = numbers_of(mixture().windows(whole[7].end, SETTINGS, process()))
    seen = [number for window in numbers_of(whole[:8]) + resumed for number in window]
    assert len(set(seen)) == 100 and sum(number < 200 for number in seen) == 70


def test_two_processes_share_the_windows_of_one():
    half = dataclasses.replace(SETTINGS, gradient_accumulation_steps=1)
    one = numbers_of(mixture().windows(Place(1), SETTINGS, process()))
    two = zip(*(numbers_of(mixture().windows(Place(1), half, process(rank, 2))) for rank in (0, 1)), strict=True)
    assert [sorted(a + b) for a, b in two] == [sorted(window) for window in one]


def test_without_weights_an_epoch_has_all_blocks_in_the_order_of_block_order():
    split = mixture(shares=None)
    assert epoch_of(split, 1) == plain_order(np.zeros(230), 42, 1).tolist()


@pytest.mark.parametrize("shares", [SHARES, {"a": 0.999, "b": 0.001}, {"a": 0.2, "b": 0.8}])
@pytest.mark.parametrize("sizes", [(200, 30), (1, 50), (7, 7)])
def test_no_source_gives_more_than_it_has_and_each_gives_something(shares, sizes):
    split = mixture(*sizes, shares)
    assert all(1 <= count <= size for count, size in zip(split.counts_in_epoch, sizes, strict=True))
    assert any(count == size for count, size in zip(split.counts_in_epoch, sizes, strict=True))


def test_block_order_gets_the_blocks_of_the_epoch_and_may_look_at_them(monkeypatch):
    """Sorted by their first token, and every second one: half of a mixture."""
    monkeypatch.setattr(data, "block_order", lambda blocks, seed, epoch: np.argsort(np.asarray(blocks)[:, 0])[::2])
    numbers = epoch_of(mixture(), 0)
    assert len(numbers) == 50 == mixture().blocks_in_epoch(42) and numbers == sorted(numbers)
    monkeypatch.setattr(data, "block_order", lambda blocks, seed, epoch: [len(blocks)])
    with pytest.raises(ValueError, match="names block 100, but there are blocks 0 to 99"):
        mixture().order(42, 0)


def test_joined_blocks_are_read_as_one_array():
    parts = [numbered(0, 3).blocks, numbered(3, 4).blocks]
    joined, whole = JoinedBlocks(parts), np.concatenate(parts)
    for index in (2, -1, slice(1, 5), np.array([[6, 0], [3, -1]]), np.zeros(0, dtype=int)):
        np.testing.assert_array_equal(joined[index], whole[index])
    np.testing.assert_array_equal(np.asarray(joined), whole)
    assert (len(joined), joined.shape) == (7, whole.shape)


# streamed


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with long.txt and short.txt, of words that only one of them has, and a tokenizer for them."""
    folder, generator = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for name, letters, size in (("long", "abcdef", 1200), ("short", "uvwxyz", 150)):
        words = ["".join(word) for word in generator.choice(list(letters), (size, 8))]
        (folder / f"{name}.txt").write_text("".join(f"{word}\n" for word in words))
    (folder / "valid.txt").write_text("abc uvw\n" * 40)
    rows = Rows.of(["abcdefuvwxyz\n"])
    load_tokenizer(Settings(tokenizer_vocab_size=257), rows).save_pretrained(folder / "tokenizer")
    return folder


def listed(texts, **more):
    train_file = [
        {"name": "long", "train_file": f"{texts}/long.txt", "weight": 0.7},
        {"name": "short", "train_file": f"{texts}/short.txt", "weight": 0.3},
    ]
    return Settings(
        **{
            "train_file": train_file,
            "validation_file": f"{texts}/valid.txt",
            "tokenizer_name": str(texts / "tokenizer"),
            "block_size": T,
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            **more,
        }
    )


def training_data(settings):
    rows, _, _ = load_sources(settings)
    return load_training(rows, load_tokenizer(settings, None), settings)


def mixed_stream(texts, monkeypatch, **more):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 400)
    settings = listed(texts, streaming=True, max_train_steps=9, **{"shuffle_buffer_size": 20, **more})
    return training_data(settings), settings


def streamed(stream, settings, start, accelerator=ALONE):
    """(blocks [n, T], the place after it as JSON) of each window."""
    found = []
    for window in stream.windows(start, settings, accelerator):
        ids, labels = (window.tensors[name].flatten(0, 1) for name in ("input_ids", "labels"))
        found.append((ids[labels[:, 0] != -100].numpy(), json.dumps(vars(window.end))))
    return found


def is_of_long(blocks, texts):
    tokenizer = load_tokenizer(listed(texts), None)
    return np.array(["a" <= text.strip()[0] <= "f" for text in tokenizer.batch_decode(blocks)])


def test_streams_are_taken_in_turn_by_weight_and_the_epoch_ends_with_the_shorter_one(texts, monkeypatch):
    stream, settings = mixed_stream(texts, monkeypatch)
    blocks = np.concatenate([blocks for blocks, _ in streamed(stream, settings, Place())])
    prepared = {
        name: load_split(load_rows(one)[0], stream.streams[name].tokenizer, "training", one).blocks
        for name, one in sources_of(dataclasses.replace(settings, streaming=False)).items()
        for one in [dataclasses.replace(one, validation_file=f"{texts}/valid.txt")]
    }
    of_long = is_of_long(blocks, texts)
    assert sorted(map(tuple, blocks[~of_long])) == sorted(map(tuple, prepared["short"]))
    assert abs(of_long.sum() - 0.7 * len(blocks)) <= 1
    behind = np.cumsum(of_long) - 0.7 * np.arange(1, len(blocks) + 1)
    assert np.abs(behind).max() <= 1, "at each block of the epoch"


def test_a_longer_stream_goes_on_in_the_next_epoch_and_each_of_its_blocks_comes_once(texts, monkeypatch):
    """The long one has more than three epochs' blocks."""
    stream, settings = mixed_stream(texts, monkeypatch)
    seen, start, lengths = [], Place(), []
    for epoch in range(3):
        windows = streamed(stream, settings, start)
        blocks = np.concatenate([blocks for blocks, _ in windows])
        seen += [tuple(block) for block in blocks[is_of_long(blocks, texts)]]
        end = Place(**json.loads(windows[-1][1]))
        lengths.append((end.per_epoch, len(blocks)))
        start = Place(epoch + 1, 0, end.per_epoch, end.stream)
    assert len(set(lengths)) == 1 and len(seen) == len(set(seen)) > 2 * lengths[0][1] * 0.69
    for _ in range(3):  # and it begins again when it is used up
        end = Place(**json.loads(streamed(stream, settings, start)[-1][1]))
        start = Place(start.epoch + 1, 0, end.per_epoch, end.stream)
    assert [place["round"] for place in start.stream["sources"]] == [1, 5]
    assert end.per_epoch == lengths[0][0]


@pytest.mark.parametrize("size", [0, 20])
def test_from_each_place_in_a_mixed_stream_come_the_windows_that_are_left(size, texts, monkeypatch):
    stream, settings = mixed_stream(texts, monkeypatch, shuffle_buffer_size=size)
    first = streamed(stream, settings, Place())
    end = Place(**json.loads(first[-1][1]))
    second = streamed(stream, settings, Place(1, 0, end.per_epoch, end.stream))
    for windows in (first, second):
        for number in range(1, len(windows) + 1, 5):
            rest = streamed(stream, settings, Place(**json.loads(windows[number - 1][1])))
            assert [place for _, place in rest] == [place for _, place in windows[number:]]
            assert all((got == wanted).all() for (got, _), (wanted, _) in zip(rest, windows[number:], strict=True))
    assert streamed(stream, settings, end) == []


@pytest.mark.parametrize("streaming", [False, True])
def test_text_and_prompts_are_mixed_and_each_keeps_its_targets(streaming, texts, tmp_path):
    """Of text each token is a target, but for a block's first; of prompts only the completions."""
    rows = [json.dumps({"prompt": "uuuu", "completion": "zz"}) for _ in range(60)]
    (tmp_path / "asked.jsonl").write_text("\n".join(rows))
    items = [{"train_file": f"{texts}/long.txt", "weight": 1}, {"train_file": f"{tmp_path}/asked.jsonl", "weight": 1}]
    items = [{"name": name, **item} for name, item in zip(("long", "asked"), items, strict=True)]
    settings = listed(texts, train_file=items, **({"streaming": True, "max_train_steps": 9} if streaming else {}))
    split, seen = training_data(settings), set()
    for window in split.windows(Place(), settings, ALONE):
        ids, labels, positions = (window.tensors[n].flatten(0, 1) for n in ("input_ids", "labels", "position_ids"))
        is_text = torch.from_numpy(is_of_long(ids, texts))
        is_filler = (labels == -100).all(1)
        assert (labels[is_text & ~is_filler][:, 1:] != -100).all()
        assert (positions[is_text] == torch.arange(T)).all()
        asked = labels[~is_text & ~is_filler]
        assert ((asked == -100).sum(1) > 2).all() and (asked != -100).any(1).all()
        seen |= set(is_text[~is_filler].tolist())
    assert seen == {True, False}


# a run


@pytest.fixture(scope="module")
def arguments(texts):
    """A mixed run of two epochs."""
    recipe = {
        "train_file": [
            {"train_file": f"{texts}/long.txt", "weight": 7},
            {"name": "brief", "train_file": f"{texts}/short.txt", "weight": 3},
        ]
    }
    (texts / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    tiny = [word for word in TINY if not re.match("--(max_train_samples|tokenizer_vocab_size)", word)]
    arguments = [f"--config={texts}/recipe.yaml", *tiny, f"--tokenizer_name={texts}/tokenizer", "--max_eval_samples=9"]
    return [*arguments, "--num_train_epochs=2", "--checkpointing_steps=8", "--checkpoints_total_limit=9"]


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main([*arguments, f"--output_dir={folder}"]) == 0
    return folder


def test_the_banner_says_what_each_source_gives(arguments, tmp_path, capsys):
    assert main([*arguments, "--max_train_steps=1", f"--output_dir={tmp_path}/run"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    found = re.findall(
        r"(long|brief): [\d,]+ rows -> .*?an epoch takes (\d+) blocks = ([\d,]+) tokens, ([\d.]+)%", printed
    )
    (a, num_a, tokens_a, share_a), (b, num_b, _, share_b) = found
    assert (a, b) == ("long", "brief") and int(num_a) == round(int(num_b) * 7 / 3)
    assert int(tokens_a.replace(",", "")) == 32 * int(num_a)
    assert abs(float(share_a) - 70) < 1 and float(share_a) + float(share_b) == pytest.approx(100)
    # without a validation file each source has rows held out, and their loss
    assert "long: the last" in printed and "brief: the last" in printed
    assert "validation long: " in printed and "eval_brief_loss" in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("step", [8, 16])
def test_a_mixed_run_that_is_resumed_ends_as_if_left_alone(step, arguments, trained, tmp_path):
    """In the middle of the first epoch, and of the second."""
    copy_until(step, trained, tmp_path / "run")
    assert main([*arguments, f"--output_dir={tmp_path}/run", "--resume_from_checkpoint=auto"]) == 0
    assert_same_run(tmp_path / "run", trained)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda items: items[0].update(weight=6), "weights of the sources: [0.7, 0.3] -> [0.666667, 0.333333]"),
        (lambda items: [item.pop("weight") for item in items], "weights of the sources: [0.7, 0.3] -> None"),
        (lambda items: items[0].update(max_train_samples=300), "training blocks: "),
        (lambda items: items.reverse(), "training blocks: "),
        (lambda items: items.pop(), "training blocks: "),
    ],
)
def test_another_mixture_is_refused(change, said, texts, arguments, trained, tmp_path, capsys):
    recipe = yaml.safe_load((texts / "recipe.yaml").read_text())
    change(recipe["train_file"])
    if len(recipe["train_file"]) == 1:
        del recipe["train_file"][0]["weight"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = [f"--config={tmp_path}/recipe.yaml", *arguments[1:], f"--output_dir={trained}"]
    copy_until(8, trained, tmp_path / "run")
    assert main([*words[:-1], f"--output_dir={tmp_path}/run", "--resume_from_checkpoint=auto"]) == 1
    error = capsys.readouterr().err
    assert "belongs to a different run" in error and said in error


def test_settings_with_sources_are_read_back_the_same(trained, arguments):
    written = read_settings([f"--config={trained}/train_config.yaml"])
    assert written == read_settings([*arguments, f"--output_dir={trained}"])
    assert weights_of(written) == {"long": 0.7, "brief": 0.3}
    card = (trained / "README.md").read_text()
    assert "on long.txt (70.0% of the blocks) and short.txt (30.0% of the blocks)." in card


@pytest.mark.parametrize("how", [pytest.param("prepared", marks=pytest.mark.slow), "streamed"])
def test_two_processes_train_on_the_mixture_of_one(how, arguments, texts, tmp_path):
    """Without dropout, equal to rounding; the second epoch is in it. Resumed by two, bit for bit."""
    arguments = [*arguments, NO_DROPOUT, "--per_device_train_batch_size=4"]
    if how == "streamed":
        arguments += ["--streaming", "--shuffle_buffer_size=20", "--max_train_steps=22", "--eval_steps=11"]
        arguments += [f"--validation_file={texts}/valid.txt"]
    one = forked(
        PROGRAMS / "small_chunks.py", *arguments, "--gradient_accumulation_steps=2", f"--output_dir={tmp_path}/one"
    )
    two = forked(PROGRAMS / "small_chunks.py", *arguments, f"--output_dir={tmp_path}/two", processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert max(line["epoch"] for line in without_timings(tmp_path / "one")) > 1
    assert_lines_agree(without_timings(tmp_path / "two"), without_timings(tmp_path / "one"))
    copy_until(8, tmp_path / "two", tmp_path / "resumed")
    more = [f"--output_dir={tmp_path}/resumed", "--resume_from_checkpoint=auto"]
    done = forked(PROGRAMS / "small_chunks.py", *arguments, *more, processes=2)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "resumed", tmp_path / "two")


def test_a_streamed_mixture_that_is_resumed_ends_as_if_left_alone(arguments, texts, tmp_path, monkeypatch):
    """In the first epoch, at its end, and in the second, in which the long stream goes on where it was."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 400)
    words = [word for word in arguments if not word.startswith("--checkpointing_steps")]
    words += ["--streaming", "--shuffle_buffer_size=20", "--max_train_steps=27", "--checkpointing_steps=9"]
    words += [f"--validation_file={texts}/valid.txt"]
    assert main([*words, f"--output_dir={tmp_path}/alone"]) == 0
    assert [line["step"] for line in lines_of(tmp_path / "alone") if "eval_loss" in line] == [0, 18, 27]
    state = json.loads((tmp_path / "alone" / "checkpoints" / "step-000027" / "state.json").read_text())
    long, short = state["position"]["stream"]["sources"]
    assert (long["round"], short["round"]) == (0, 1)
    for step in (9, 18):
        copy_until(step, tmp_path / "alone", tmp_path / f"from-{step}")
        assert main([*words, f"--output_dir={tmp_path}/from-{step}", "--resume_from_checkpoint=auto"]) == 0
        assert_same_run(tmp_path / f"from-{step}", tmp_path / "alone")


# settings


def read_recipe(entries, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(entries))
    return read_settings([f"--config={tmp_path}/recipe.yaml", *MODEL])


def test_the_command_line_takes_several_files_and_names(texts, monkeypatch):
    monkeypatch.chdir(texts)
    settings = read_settings([*MODEL, "--train_file", "long.txt", "other=short.txt"])
    assert {name: one.train_file for name, one in sources_of(settings).items()} == {
        "long": "long.txt",
        "other": "short.txt",
    }
    assert weights_of(settings) is None
    assert read_settings([*MODEL, "--train_file", "long.txt", "--train_file", "short.txt"]).train_file == "short.txt"


def test_a_source_has_the_runs_settings_but_for_its_own(texts, tmp_path):
    items = [
        {"name": "a", "train_file": f"{texts}/long.txt", "text_column": "body", "weight": 1},
        {"dataset_name": "some/data", "dataset_config_name": "c", "max_train_samples": 5, "weight": 3},
    ]
    found = sources_of(read_recipe({"train_file": items, "text_column": "text", "max_train_samples": 9}, tmp_path))
    a, b = found["a"], found["data"]
    assert (a.train_file, a.dataset_name, a.text_column, a.max_train_samples) == (
        f"{texts}/long.txt",
        None,
        ["body"],
        9,
    )
    assert (b.train_file, b.dataset_name, b.dataset_config_name) == (None, "some/data", "c")
    assert (b.text_column, b.max_train_samples) == (["text"], 5)


@pytest.mark.parametrize(
    "items, said",
    [
        (
            [{"train_file": "{}/long.txt", "wieght": 1}],
            "train_file, item 1: wieght is no key of it; there are name, train",
        ),
        (
            [{"train_file": "{}/long.txt", "weight": 0}, "{}/short.txt"],
            "item 1: weight is 0, but must be a number, above 0",
        ),
        (
            [{"train_file": "{}/long.txt", "weight": 1}, "{}/short.txt"],
            "1 of 2 items have a weight: give one to each, or",
        ),
        ([{"train_file": "{}/long.txt", "weight": 1}], "the weight of a single source has no effect"),
        ([{"train_file": "{}/long.txt", "dataset_name": "d"}], "item 1: needs train_file or dataset_name, one of them"),
        ([{"weight": 1}], "item 1: needs train_file or dataset_name, one of them"),
        (
            [{"train_file": "{}/long.txt", "dataset_config_name": "c"}],
            "item 1: dataset_config_name needs dataset_name",
        ),
        (["{}/long.txt", "{}/long.txt"], "long is the name of two items"),
        (["{}/long.txt", "{}/none.txt"], "none.txt: no such file"),
        (
            ["{}/long.txt", {"train_file": "{}/short.txt", "max_train_samples": "few"}],
            "item 2: max_train_samples is 'few'",
        ),
    ],
)
def test_a_source_that_cannot_be_is_one_sentence(items, said, texts, tmp_path):
    filled = json.loads(json.dumps(items).replace("{}", str(texts)))
    with pytest.raises(UserError) as error:
        read_recipe({"train_file": filled}, tmp_path)
    (problem,) = str(error.value).split("\n")
    assert said in problem


def test_streams_without_weights_are_refused(texts):
    words = [*MODEL, "--streaming", "--max_train_steps=3", f"--validation_file={texts}/valid.txt"]
    with pytest.raises(UserError, match="streaming several sources needs a weight for each, in a recipe"):
        read_settings([*words, "--train_file", f"{texts}/long.txt", f"{texts}/short.txt"])


def test_files_and_data_sets_stand_in_one_list_and_each_has_rows_held_out(texts, tmp_path):
    items = [f"{texts}/long.txt", {"dataset_name": "python_docs"}]
    train, validation, note = load_sources(read_recipe({"train_file": items}, tmp_path))
    assert {name: len(rows) for name, rows in train.items()} == {"long": 1140, "python_docs": 76}
    assert {name: len(rows) for name, rows in validation.items()} == {"long": 60, "python_docs": 3}
    assert note.startswith("long: the last 60 of 1,200 training rows") and "python_docs: the last 3 of 79" in note


def test_a_data_set_may_have_a_validation_file(texts):
    settings = read_settings([*MODEL, "--dataset_name=python_docs", f"--validation_file={texts}/valid.txt"])
    train, validation, note = load_sources(settings)
    assert len(train["training"]) == 79 and len(validation["validation"]) == 40 and note == ""


def test_the_recipe_on_the_page_is_valid(texts, tmp_path, monkeypatch):
    page = (ROOT / "train_loop" / "data" / "README.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for name in ("my.txt", "other.txt", "valid.jsonl", "recipe.yaml"):
        (tmp_path / name).write_text(recipe)
    monkeypatch.chdir(tmp_path)
    settings = read_settings(["--config=recipe.yaml"])
    assert weights_of(settings) == {"my": 0.7, "wiki": 0.3}
    assert list(sources_of(settings)) == ["my", "wiki"] and list(validation_sets_of(settings)) == ["mine", "log"]
    said = re.search(r"all the keys of a source: (.*?)\. What", page, re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", said)) == {"name", "weight", *OF_TRAINING}
