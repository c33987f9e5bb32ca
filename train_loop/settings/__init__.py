"""The settings of a run. Nothing heavy is imported, so that `--help` and a mistyped flag answer at once.

settings.py        every setting: name, type, default, what it means; field.py: what one is made of;
                   choices.py: the schedules and trackers that there are
sources.py         lists of sources and of validation sets      values.py   written values become values of a type
command_line.py    defaults, then a recipe (YAML), then the command line
contradictions.py  contradictions between settings, files that are not usable
habits.py          the arguments of transformers' scripts
page.py            writes README.md, which lists them and the loop's own settings
"""

from train_loop.settings.choices import SCHEDULES, TRACKERS
from train_loop.settings.command_line import read_settings
from train_loop.settings.settings import Settings, as_recipe
from train_loop.settings.sources import sources_of, validation_sets_of, weights_of

__all__ = [
    "SCHEDULES",
    "TRACKERS",
    "Settings",
    "as_recipe",
    "read_settings",
    "sources_of",
    "validation_sets_of",
    "weights_of",
]
