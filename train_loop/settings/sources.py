"""Several sources of training rows, and several validation sets: the lists that `train_file`, `dataset_name` and
`validation_file` take.

On the command line a list is FILE or NAME=FILE, several times. In a recipe an item is that, or a mapping with some of
the keys in `KEYS`; a mapping {name: file, ...} in the place of the list gives names too. A setting that an item does
not have is that of the whole run.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from train_loop.files import FILE_KINDS, data_files
from train_loop.settings.field import above, setting
from train_loop.settings.settings import Settings
from train_loop.settings.values import read_value

OF_TRAINING = ("train_file", "dataset_name", "dataset_config_name", "text_column", "max_train_samples")
OF_VALIDATION = ("validation_file", "text_column", "max_eval_samples")
# what an item of each list may hold beside its name; weights only where there is training
KEYS = {"train_file": OF_TRAINING, "dataset_name": OF_TRAINING, "validation_file": OF_VALIDATION}
LISTS = tuple(KEYS)
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # what trackers take
# eval_text_tokens and eval_dropped_tokens are numbers of the first set already
TAKEN = re.compile(r"(.*_)?(text|dropped)")


@dataclasses.dataclass
class Item:
    """What an item of a list has beside keys that are settings of a run."""

    name: str | None = setting("data", None, "what the source or the set is called")
    weight: float | None = setting("data", None, "its share of an epoch, beside those of the others", **above(0))


def read_list(f: dataclasses.Field, value: Any, where: str, problems: list[str]) -> Any:
    """`value` as the setting `f`, one of `LISTS`, takes it: None or a text as it is, several items as a list of
    mappings, each with a name. Sentences about what is wrong go to `problems`; they begin with `where`."""
    if isinstance(value, dict):
        value = [{"name": name, **(v if isinstance(v, dict) else {f.name: v})} for name, v in value.items()]
    written = value if isinstance(value, list) else [value]
    if len(written) == 1 and not isinstance(written[0], dict) and not _split_name(written[0])[0]:
        return read_value(f, written[0], where, problems)
    before = len(problems)
    items = [_read_item(f, item, f"{where}, item {i}:", problems) for i, item in enumerate(written, start=1)]
    if not items:
        problems.append(f"{where} is an empty list")
    if len(problems) > before:
        return None
    names = [item["name"] for item in items]
    problems += [f"{where}: {n} is the name of two items: give one of them another, as NAME=..." for n in _twice(names)]
    num_weights = sum("weight" in item for item in items)
    if num_weights and len(items) == 1:
        problems.append(f"{where}: the weight of a single source has no effect: leave it out")
    elif num_weights not in (0, len(items)):
        problems.append(f"{where}: {num_weights} of {len(items)} items have a weight: give one to each, or to none")
    return items


def _twice(names: list[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _split_name(text: Any) -> tuple[str | None, Any]:
    """(name, rest) of NAME=FILE; (None, text) of what is a file as it stands, or has no name."""
    found = re.fullmatch(rf"({NAME})=([^\0]+)", text) if isinstance(text, str) else None
    if not found or any(path.exists() for path in data_files(text).paths):
        return None, text
    return found[1], found[2]


def _read_item(f: dataclasses.Field, item: Any, where: str, problems: list[str]) -> dict[str, Any]:
    """An item of the list `f` as a mapping, with a name. What is wrong with it goes to `problems`."""
    if not isinstance(item, dict):
        name, path = _split_name(item)
        item = {f.name: path} | ({"name": name} if name else {})
    fields = {of.name: of for kind in (Item, Settings) for of in dataclasses.fields(kind)}
    allowed = ["name", *KEYS[f.name]] + ["weight"] * (f.name != "validation_file")
    before, found = len(problems), {}
    for key, value in item.items():
        if key not in allowed:
            problems.append(f"{where} {key} is no key of it; there are {', '.join(allowed)}")
        elif value is not None:
            found[key] = read_value(fields[key], value, f"{where} {key}", problems)
    places = [key for key in ("train_file", "dataset_name", "validation_file") if key in found]
    if len(problems) == before and len(places) != 1:
        wanted = "validation_file" if f.name == "validation_file" else "train_file or dataset_name, one of them"
        problems.append(f"{where} needs {wanted}")
    if len(problems) > before:
        return {}
    if "dataset_config_name" in found and "dataset_name" not in found:
        problems.append(f"{where} dataset_config_name needs dataset_name")
    name = found.pop("name", None) or _name_of(found[places[0]])
    if not re.fullmatch(NAME, name):
        problems.append(f"{where} {name!r} is no name: letters, digits, '.', '_' and '-'. Give one, as NAME=...")
    elif TAKEN.fullmatch(name):
        problems.append(f"{where} the name {name} has another meaning in metrics.jsonl: give a different one")
    return {"name": name, **found}


def _name_of(place: str) -> str:
    """The name of a file without its endings, or of a data set without its owner."""
    path = Path(place)
    for ending in (".gz", *FILE_KINDS):
        path = path.with_suffix("") if path.suffix.lower() == ending else path
    return path.name


def sources_of(settings: Settings) -> dict[str, Settings]:
    """{name: the settings of one source} of the training rows. Of one source without a name: "training"."""
    for items in (settings.train_file, settings.dataset_name):
        if isinstance(items, list):
            return {item["name"]: _with(settings, item) for item in items}
    alone = dataclasses.replace(settings, validation_file=None)
    return {"training": alone} if settings.train_file or settings.dataset_name else {}


def validation_sets_of(settings: Settings) -> dict[str, Settings]:
    """{name: the settings of one set} of the validation files. Of one file without a name: "validation"."""
    if isinstance(settings.validation_file, list):
        return {item["name"]: _with(settings, item) for item in settings.validation_file}
    alone = dataclasses.replace(settings, train_file=None, dataset_name=None)
    return {"validation": alone} if settings.validation_file else {}


def _with(settings: Settings, item: dict[str, Any]) -> Settings:
    alone = dict.fromkeys(LISTS)  # what other items have is not this one's
    values = {key: value for key, value in item.items() if key not in ("name", "weight")}
    return dataclasses.replace(settings, **{**alone, **values})


def weights_of(settings: Settings) -> dict[str, float] | None:
    """{name of a source: its share of an epoch's blocks}; the shares are 1 together. None: all blocks of each."""
    for items in (settings.train_file, settings.dataset_name):
        if isinstance(items, list) and len(items) > 1 and "weight" in items[0]:
            total = sum(item["weight"] for item in items)
            return {item["name"]: item["weight"] / total for item in items}
    return None
