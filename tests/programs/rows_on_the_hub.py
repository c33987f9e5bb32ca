"""Prints {data set: [its rows prepared, its rows streamed]} of data sets on the hub, as JSON."""

import json
import sys

from train_loop.data import load_rows, load_source
from train_loop.settings import Settings

found = {}
for name in sys.argv[1:]:
    settings = Settings(dataset_name=name)
    prepared = [row["text"] for row in load_rows(settings)[0]]
    source = load_source(settings)[0]
    found[name] = [prepared, [text for chunk in source.chunks(None) for text in source.texts(*chunk)]]
print(json.dumps(found))
