"""Prepares the tokens of a file. Prints the number of blocks, and whether `datasets` was imported."""

import sys

from train_loop.data import Rows, load_rows, load_split
from train_loop.model import load_tokenizer
from train_loop.settings import Settings

settings = Settings(train_file=sys.argv[1], validation_split_percentage=50, tokenizer_vocab_size=280, block_size=8)
train, validation, _ = load_rows(settings)
tokenizer = load_tokenizer(settings, Rows.of(["one two three"] * 9))
print(len(load_split(train, tokenizer, "training", settings).blocks), "datasets" in sys.modules)
