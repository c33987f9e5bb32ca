"""Values as they are written, on the command line or in YAML, become values of the settings' types."""

import dataclasses
import json
import math
import os
import types
from typing import Any


def read_value(f: dataclasses.Field, value: Any, where: str, problems: list[str]) -> Any:
    """`value` as the setting `f` takes it. Where it does not, a sentence that begins with `where` goes to `problems`,
    and the setting's default is returned."""
    try:
        converted = convert(value, f.type)
        if f.metadata["is_path"] and converted is not None:
            converted = os.path.expanduser(converted)
        if converted is not None and f.metadata["check"] and not f.metadata["check"](converted):
            raise ValueError
        return converted
    except (ValueError, OverflowError, RecursionError):  # the last: JSON that is nested too deep
        wanted = ", ".join(filter(None, [type_name(f.type), f.metadata["wanted"]]))
        shown = repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:100]}..."
        problems.append(
            f"{where} needs a value: {wanted}" if value in ("", [""]) else f"{where} is {shown}, but must be {wanted}"
        )
        return f.default


def convert(value: Any, kind: Any) -> Any:
    """`value` (text of the command line, or a YAML value) as `kind`, one of a field's types; ValueError if it is none.

    YAML reads 2e-5 as text, so a number may come as text from there too; a bool is never a number.
    """
    if value is None and kind != kind_of(kind):
        return None
    kind = kind_of(kind)
    if kind == list[str] and value != []:
        return [convert(entry, str) for entry in (value if isinstance(value, list) else [value])]
    if kind == dict[str, float]:
        mapping = json.loads(value) if isinstance(value, str) else value
        if not isinstance(mapping, dict):
            raise ValueError
        return {str(name): convert(number, float) for name, number in mapping.items()} or None
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind is str and isinstance(value, (str, int)) and not isinstance(value, bool) and str(value):
        if "\0" in str(value):  # no path has it
            raise ValueError
        return str(value)
    if kind in (int, float) and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        number = float(value)
        if math.isfinite(number) and (kind is float or number.is_integer()):
            is_whole = kind is int and str(value).lstrip("-").isdigit()
            return int(value) if is_whole else kind(number)  # a float would round beyond 2 ** 53
    raise ValueError


def kind_of(kind: Any) -> Any:
    """The type of a setting, without the None that stands for off."""
    return next(k for k in (kind.__args__ if isinstance(kind, types.UnionType) else (kind,)) if k is not types.NoneType)


def type_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list[str]: "text"}
    return names.get(kind_of(kind), "a mapping of names to numbers, on the command line as JSON")
