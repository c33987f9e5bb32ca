"""The rows of all sources of a run, and of all its validation sets, by name."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerFast

from train_loop.data.blocks import Split, TrainingData, load_split
from train_loop.data.mixture import MixedStream, Mixture
from train_loop.data.row_files import Rows
from train_loop.data.rows import load_file, load_rows
from train_loop.data.sources import Source, load_source
from train_loop.data.streaming import Stream
from train_loop.settings import Settings, sources_of, validation_sets_of, weights_of


def load_sources(settings: Settings) -> tuple[dict[str, Rows | Source], dict[str, Rows], str]:
    """(training rows, validation rows, note). Training rows: by source name, {} when only evaluating validation files.
    Validation rows: by set name. Without a validation_file each source has a set of the same name; a single source's
    set is "validation". The note says where held-out rows come from.

    Raises UserError as `load_rows` and `load_source` do.
    """
    sources, sets = sources_of(settings), validation_sets_of(settings)
    eval_rows = {name: load_file(str(one.validation_file), one) for name, one in sets.items()}
    if sets and settings.eval_only:
        return {}, eval_rows, ""
    given = next(iter(eval_rows.values()), None)
    train_rows: dict[str, Rows | Source] = {}
    notes = {}
    for name, source in sources.items():
        train, validation, note = (load_source if settings.streaming else load_rows)(source, given)
        if train is not None:
            train_rows[name] = train
        if note:
            notes[name] = note
        if not sets:
            eval_rows[name if len(sources) > 1 else "validation"] = validation
    if len(sources) > 1:
        notes = {name: f"{name}: {note}" for name, note in notes.items()}
    return train_rows, eval_rows, "; ".join(notes.values())


def all_rows(train_rows: Mapping[str, Rows | Source]) -> Iterator[dict[str, Any]]:
    """The rows of all sources, to train a tokenizer. No source may be a stream."""
    for rows in train_rows.values():
        assert isinstance(rows, Rows)  # a stream trains no tokenizer (`contradictions`)
        yield from rows


def load_training(
    rows: Mapping[str, Rows | Source],
    tokenizer: PreTrainedTokenizerFast,
    settings: Settings,
    show_progress: bool = False,
) -> TrainingData:
    """The training data of all sources. Raises UserError as `load_split` and `Stream` do."""
    of_each, shares, buffer_size = sources_of(settings), weights_of(settings), settings.shuffle_buffer_size
    splits: dict[str, Split] = {}
    streams: dict[str, Stream] = {}
    for name, of_one in rows.items():
        called, own = "training" if len(rows) == 1 else f"{name} training", of_each[name]
        if isinstance(of_one, Rows):
            splits[name] = load_split(of_one, tokenizer, called, own, show_progress)
        else:  # sources share the shuffle buffer
            size = round(buffer_size * shares[name]) if shares else buffer_size
            own = replace(own, shuffle_buffer_size=size)
            streams[name] = Stream(of_one, tokenizer, own, called)
    if len(rows) == 1:
        return splits[name] if splits else streams[name]
    if splits:
        return Mixture(splits, shares)
    assert shares is not None  # streams need weights (`contradictions`)
    return MixedStream(streams, shares, settings)


def load_validation(
    rows: dict[str, Rows], tokenizer: PreTrainedTokenizerFast, settings: Settings, show_progress: bool = False
) -> dict[str, Split]:
    """The validation sets by name, in their order. The first one selects the best model. Raises UserError as
    `load_split` does."""
    of_each = sources_of(settings) | validation_sets_of(settings)
    splits = {}
    for name, of_one in rows.items():
        called = "validation" if len(rows) == 1 else f"{name} validation"
        splits[name] = load_split(of_one, tokenizer, called, of_each.get(name, settings), show_progress)
    return splits
