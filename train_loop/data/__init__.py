"""Rows of text become windows of equal blocks. The loop uses only the names exported here.

rows.py       rows from files, folders, data sets     sources.py     the same in chunks, from any place
tokens.py     rows -> one file of tokens on disk      streaming.py   chunks -> blocks, while training runs
prompts.py    prompts and chats -> tokens with marks  chats.py       what the assistant wrote in a chat
marks.py      facts about a token, beside its id      token_ids.py   what the tokenizer makes of texts
columns.py    which columns hold the rows
blocks.py     tokens -> blocks -> windows, and the order of an epoch
text.py       the words and bytes of the text that tokens stand for
row_files.py  files -> rows, with one of the readers that formats.py chooses: text_files.py, json_files.py, tables.py
inputs.py     all sources and validation sets, by name        mixture.py     blocks of several sources, by weight
sets.py       the files of a data set                 token_cache.py  files of tokens: verified, listed, removed
"""

from train_loop.data.blocks import (
    IGNORED,
    Split,
    TrainingData,
    Window,
    Windows,
    block_order,
    inputs_and_labels,
    load_split,
    load_windows,
    model_inputs,
)
from train_loop.data.columns import texts_of
from train_loop.data.inputs import all_rows, load_sources, load_training, load_validation
from train_loop.data.row_files import Rows
from train_loop.data.rows import load_file, load_rows
from train_loop.data.sources import Source, load_source
from train_loop.data.streaming import Stream
from train_loop.data.text import CoveredText
from train_loop.data.token_cache import cached_tokens, clear_cached_tokens, token_folder

__all__ = [
    "IGNORED",
    "CoveredText",
    "Rows",
    "Source",
    "Split",
    "Stream",
    "TrainingData",
    "Window",
    "Windows",
    "all_rows",
    "block_order",
    "cached_tokens",
    "clear_cached_tokens",
    "inputs_and_labels",
    "load_file",
    "load_rows",
    "load_source",
    "load_sources",
    "load_split",
    "load_training",
    "load_validation",
    "load_windows",
    "model_inputs",
    "texts_of",
    "token_folder",
]
