"""What a setting is made of: its default, its help, and the values that it takes."""

from dataclasses import field
from typing import Any

# a file or a data set; or several, each a mapping with a name (sources.py)
Sources = str | list[dict[str, Any]] | None


def setting(group: str, default: Any, help: str, check: Any = None, wanted: str = "", is_path: bool = False) -> Any:
    """A field of `Settings`: `check(value)` must hold for every value but None, and `wanted` says so in words. In the
    value of one that is a path, or may be one, ~ is the home folder."""
    metadata = {"group": group, "help": help, "check": check, "wanted": wanted, "is_path": is_path}
    return field(default=default, metadata=metadata)


def at_least(low: float) -> dict[str, Any]:
    return {"check": lambda value: value >= low, "wanted": f"at least {low}"}


def above(low: float) -> dict[str, Any]:
    return {"check": lambda value: value > low, "wanted": f"above {low}"}


def one_of(*names: str) -> dict[str, Any]:
    return {"check": lambda value: value in names, "wanted": "one of " + ", ".join(names)}


FRACTION: dict[str, Any] = {"check": lambda value: 0 <= value < 1, "wanted": "at least 0 and below 1"}
