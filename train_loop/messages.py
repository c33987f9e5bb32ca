"""Sentences for whoever runs this, on stderr."""

import sys


def tell(sentence):
    print(sentence, file=sys.stderr, flush=True)


def warn(sentence):
    tell(f"warning: {sentence}")


def one_line(error):
    """The innermost reason of an exception, on one line, at most 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")
