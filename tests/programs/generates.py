"""Prints what a model of the hub makes of "The value", as somebody without this package would ask it."""

import sys

from transformers import pipeline

print(pipeline("text-generation", model=sys.argv[1])("The value", max_new_tokens=5)[0]["generated_text"])
