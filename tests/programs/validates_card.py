"""Asks the hub about a model card, and about the same card with a broken license."""

import sys

from huggingface_hub import ModelCard

card = ModelCard.load(sys.argv[1])
card.validate()
card.data.license = ["not", 1]
try:
    card.validate()
except ValueError as error:
    print("refused:", error)
