"""Several sources of training rows: which blocks an epoch takes, prepared and streamed, from any place."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from train_loop.data import blocks as data
from train_loop.data import sources
from train_loop.data.blocks import Split, load_split
from train_loop.data.inputs import load_sources, load_training
from train_loop.data.mixture import JoinedBlocks, Mixture
from train_loop.data.rows import load_rows
from train_loop.model import load_tokenizer
from train_loop.position import Place
from train_loop.settings import Settings, sources_of

plain_order = data.block_order
T = 8
SHARES = {"a": 0.7, "b": 0.3}


def process(rank=0, world_size=1):
    return SimpleNamespace(
        num_processes=world_size, process_index=rank, device=torch.device("cpu"), is_main_process=rank == 0
    )


ALONE = process()


def numbered(first, size):
    """Blocks that can be told apart: block i consists of the token i."""
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
    assert split.num_blocks == split.blocks_in_epoch(SETTINGS) == 100
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
    assert len(numbers) == 50 == mixture().blocks_in_epoch(SETTINGS) and numbers == sorted(numbers)
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


def listed(two_texts, **more):
    train_file = [
        {"name": "long", "train_file": f"{two_texts}/long.txt", "weight": 0.7},
        {"name": "short", "train_file": f"{two_texts}/short.txt", "weight": 0.3},
    ]
    return Settings(
        **{
            "train_file": train_file,
            "validation_file": f"{two_texts}/valid.txt",
            "tokenizer_name": str(two_texts / "tokenizer"),
            "block_size": T,
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            **more,
        }
    )


def training_data(settings):
    rows, _, _ = load_sources(settings)
    return load_training(rows, load_tokenizer(settings, None), settings)


def mixed_stream(two_texts, monkeypatch, **more):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 400)
    settings = listed(two_texts, streaming=True, max_train_steps=9, **{"shuffle_buffer_size": 20, **more})
    return training_data(settings), settings


def streamed(stream, settings, start, accelerator=ALONE):
    """(blocks [n, T], the place after it as JSON) of each window."""
    found = []
    for window in stream.windows(start, settings, accelerator):
        ids, labels = (window.tensors[name].flatten(0, 1) for name in ("input_ids", "labels"))
        found.append((ids[labels[:, 0] != -100].numpy(), json.dumps(vars(window.end))))
    return found


def is_of_long(blocks, two_texts):
    tokenizer = load_tokenizer(listed(two_texts), None)
    return np.array(["a" <= text.strip()[0] <= "f" for text in tokenizer.batch_decode(blocks)])


def test_streams_are_taken_in_turn_by_weight_and_the_epoch_ends_with_the_shorter_one(two_texts, monkeypatch):
    stream, settings = mixed_stream(two_texts, monkeypatch)
    blocks = np.concatenate([blocks for blocks, _ in streamed(stream, settings, Place())])
    prepared = {
        name: load_split(load_rows(one)[0], stream.streams[name].tokenizer, "training", one).blocks
        for name, one in sources_of(dataclasses.replace(settings, streaming=False)).items()
        for one in [dataclasses.replace(one, validation_file=f"{two_texts}/valid.txt")]
    }
    of_long = is_of_long(blocks, two_texts)
    assert sorted(map(tuple, blocks[~of_long])) == sorted(map(tuple, prepared["short"]))
    assert abs(of_long.sum() - 0.7 * len(blocks)) <= 1
    behind = np.cumsum(of_long) - 0.7 * np.arange(1, len(blocks) + 1)
    assert np.abs(behind).max() <= 1, "at each block of the epoch"


def test_a_longer_stream_continues_in_the_next_epoch_and_no_block_comes_twice(two_texts, monkeypatch):
    """The long one has more than three epochs' blocks."""
    stream, settings = mixed_stream(two_texts, monkeypatch)
    seen, start, lengths = [], Place(), []
    for epoch in range(3):
        windows = streamed(stream, settings, start)
        blocks = np.concatenate([blocks for blocks, _ in windows])
        seen += [tuple(block) for block in blocks[is_of_long(blocks, two_texts)]]
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
def test_from_each_place_in_a_mixed_stream_come_the_windows_that_are_left(size, two_texts, monkeypatch):
    stream, settings = mixed_stream(two_texts, monkeypatch, shuffle_buffer_size=size)
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
def test_text_and_prompts_are_mixed_and_each_keeps_its_targets(streaming, two_texts, tmp_path):
    """Of text each token is a target, but for a block's first; of prompts only the completions."""
    rows = [json.dumps({"prompt": "uuuu", "completion": "zz"}) for _ in range(60)]
    (tmp_path / "asked.jsonl").write_text("\n".join(rows))
    items = [
        {"train_file": f"{two_texts}/long.txt", "weight": 1},
        {"train_file": f"{tmp_path}/asked.jsonl", "weight": 1},
    ]
    items = [{"name": name, **item} for name, item in zip(("long", "asked"), items, strict=True)]
    settings = listed(two_texts, train_file=items, **({"streaming": True, "max_train_steps": 9} if streaming else {}))
    split, seen = training_data(settings), set()
    for window in split.windows(Place(), settings, ALONE):
        ids, labels, positions = (window.tensors[n].flatten(0, 1) for n in ("input_ids", "labels", "position_ids"))
        is_text = torch.from_numpy(is_of_long(ids, two_texts))
        is_filler = (labels == -100).all(1)
        assert (labels[is_text & ~is_filler][:, 1:] != -100).all()
        assert (positions[is_text] == torch.arange(T)).all()
        asked = labels[~is_text & ~is_filler]
        assert ((asked == -100).sum(1) > 2).all() and (asked != -100).any(1).all()
        seen |= set(is_text[~is_filler].tolist())
    assert seen == {True, False}
