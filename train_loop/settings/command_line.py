"""`Settings` from the defaults, then a recipe (YAML), then the command line.

Nothing heavy is imported here, so that `--help` and a mistyped flag answer at once.
"""

import argparse
import dataclasses
import difflib
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml

from train_loop.errors import UserError, tell
from train_loop.settings import habits
from train_loop.settings.contradictions import contradictions
from train_loop.settings.settings import Settings, as_recipe
from train_loop.settings.sources import LISTS, read_list
from train_loop.settings.values import kind_of, read_value, type_name

PACKAGE = Path(__file__).parent.parent
RECIPES = PACKAGE / "recipes"
# inside the package if it is installed, beside it in a clone
LAUNCH_CONFIGS = next((p for p in (PACKAGE / "launch_configs", PACKAGE.parent / "launch_configs") if p.is_dir()), None)
RECIPE_BYTES = 2**20  # a larger file is not a recipe
# without any of these, and without a recipe, the run is the quickstart
MODEL_OR_DATA = {
    "model_name_or_path",
    "config_name",
    "model_type",
    "dataset_name",
    "train_file",
    "validation_file",
}


def read_settings(argv: list[str]) -> Settings:
    """The settings that the command line `argv` (a list of words) asks for.

    Raises UserError with one line for each problem: unknown keys, wrong types, values out of range, contradictions,
    missing files. `--help` prints all settings, `--print_config` prints the resulting ones as a recipe, and
    `--print_launch_config NAME` prints a launch config. These three raise SystemExit.
    """
    problems: list[str] = []
    remarks: list[str] = []
    entries: dict[str, Any] = {}
    values: dict[str, Any] = {}
    recipe, flags = _split_command_line(argv, problems)
    if "print_launch_config" in flags:
        _print_launch_config(flags["print_launch_config"])
    print_config = flags.pop("print_config", False)
    if recipe is None and not MODEL_OR_DATA & set(flags):
        recipe = "quickstart"
    if recipe is not None:
        entries = _read_recipe(recipe, problems)
        _take(entries, f"recipe {recipe}: ", values, problems, remarks)
    _take(flags, "the command line: --", values, problems, remarks)
    settings = Settings(**values)
    problems = problems or contradictions(settings)
    if problems:
        raise UserError("\n".join(problems))
    if habits.ALIASES.keys() & {*entries, *flags}:
        remarks += habits.remarks_on_defaults(values)
    is_main = int(os.environ.get("RANK", 0)) == 0
    for remark in remarks if is_main else []:
        tell(f"note: {remark}")
    if print_config:
        if is_main:
            print(as_recipe(settings), end="")
        sys.exit()
    return settings


def _take(
    entries: dict[str, Any], source: str, values: dict[str, Any], problems: list[str], remarks: list[str]
) -> None:
    """Converts `entries`, {name: value as it was written}, to the types of the settings and puts them into `values`.
    `source`: the beginning of a message about one of them."""
    fields = {f.name: f for f in dataclasses.fields(Settings)}
    entries, written, refused = habits.translate(entries, remarks)
    problems += [f"{source}{name}: {instead}" for name, instead in refused]
    for name, value in entries.items():
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1, cutoff=0.8)  # a lower cutoff takes any flag for a typo
            dashes = "--" * source.endswith("--")
            hint = f"; did you mean {dashes}{close[0]}?" if close else ""
            problems.append(f"{source}{name} is not a setting{hint}")
            continue
        f = fields[name]
        shown = f"{source}{written.get(name, name)}"
        if name in LISTS:
            values[name] = read_list(f, value, shown, problems)
        else:
            values[name] = read_value(f, value, shown, problems)


def _split_command_line(argv: list[str], problems: list[str]) -> tuple[str | None, dict[str, Any]]:
    """(recipe or None, {flag: text}). A word that is neither a flag nor the value of one goes to `problems`."""
    parser = argparse.ArgumentParser(
        prog="train_loop/main.py",
        usage="accelerate launch %(prog)s [--config RECIPE] [--NAME VALUE ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Fine-tune a causal language model. A flag wins over the recipe, the recipe over the default. "
        "Without --config, a model or data, the recipe is quickstart.",
    )
    parser.add_argument("--config", metavar="RECIPE", nargs="?", help=f"a YAML file, or one of: {_recipes()}")
    parser.add_argument("--print_config", action="store_true", help="print the settings as a recipe, and stop")
    parser.add_argument(
        "--print_launch_config",
        metavar="NAME",
        nargs="?",
        help=f"print a launch config, and stop; one of: {', '.join(_launch_configs())}",
    )
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(Settings):
        group = f.metadata["group"]
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        default = "" if f.default is None else f" (default: {str(f.default).lower() if f.type is bool else f.default})"
        wanted = f"; {f.metadata['wanted']}" if f.metadata["wanted"] else ""
        several = kind_of(f.type) == list[str] or f.name in LISTS
        groups[group].add_argument(
            f"--{f.name}",
            nargs="*" if several else "?",
            action="extend" if several and f.name not in LISTS else "store",
            const="true" if kind_of(f.type) is bool else None,
            metavar="true|false" if kind_of(f.type) is bool else type_name(f.type).split()[-1].upper(),
            help=(f.metadata["help"] + wanted + default).replace("%", "%%"),
        )
    for name in habits.ALIASES:
        parser.add_argument(f"--{name}", nargs="?", const="true", help=argparse.SUPPRESS)
    for name in [*habits.NO_EFFECT, *habits.REFUSED]:
        parser.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)
    known, unknown = parser.parse_known_args(map(_underscored, argv))
    flags = vars(known)
    for word in unknown:
        if word.startswith("--"):
            flags[word[2:].split("=")[0]] = ""
        elif not (unknown.index(word) and unknown[unknown.index(word) - 1].startswith("--")):
            hint = f"; did you mean --config {word}?" if word.endswith((".yaml", ".yml", ".json")) else ""
            problems.append(f"the command line: {word!r} is not the value of any flag{hint}")
    if "config" in flags and flags["config"] is None:
        problems.append("the command line: --config needs the name of a recipe or a YAML file")
    for name, value in flags.items():
        if name in habits.REFUSED or name in habits.NO_EFFECT:
            flags[name] = " ".join(value) or "true"
        elif value in (None, []) and name != "config":
            flags[name] = ""  # a flag without its value: every type refuses this
    return flags.pop("config", None), flags


def _underscored(word: str) -> str:
    """--block-size=64 as --block_size=64: both work, as in transformers' own parser."""
    flag, equals, value = word.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def _recipes() -> str:
    return ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))


def _launch_configs() -> dict[str, Path]:
    """{name: path} of the Accelerate configs, the Slurm script and the notebook."""
    files = sorted(LAUNCH_CONFIGS.iterdir()) if LAUNCH_CONFIGS else []
    return {path.stem: path for path in files if path.suffix in (".yaml", ".sbatch", ".ipynb")}


def _print_launch_config(name: str) -> NoReturn:
    found = _launch_configs()
    if name not in found:
        raise UserError(f"--print_launch_config {name}: there is no such file. Choose one of {', '.join(found)}")
    print(found[name].read_text(encoding="utf-8"), end="")
    sys.exit()


class _Loader(yaml.SafeLoader):
    """YAML for recipes: a key may appear once only, and aliases are refused, because a few lines of them can stand for
    billions of values."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(
                f"line {self.peek_event().start_mark.line + 1}: aliases (*name) are not allowed in a recipe"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: a name is given twice")
        return mapping


def _read_recipe(recipe: str, problems: list[str]) -> dict[str, Any]:
    """The mapping in a recipe, given by name or path. If it cannot be read: {}, and a line in `problems`."""
    path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        path = Path(recipe).expanduser()
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(RECIPE_BYTES + 1)
        if len(text) > RECIPE_BYTES:
            raise ValueError(f"it is larger than {RECIPE_BYTES:,} characters")
        entries = yaml.load(text, _Loader)
        if not isinstance(entries, dict):
            raise ValueError("it is not a list of 'name: value' lines")
        return {str(name): value for name, value in entries.items()}
    except FileNotFoundError:
        problems.append(f"the command line: --config {recipe} is neither a file nor a recipe; recipes are {_recipes()}")
    except RecursionError:
        problems.append(f"--config {recipe} cannot be read: its lists are nested too deep")
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"--config {recipe} cannot be read: {' '.join(str(error).split())[:300]}")
    return {}
