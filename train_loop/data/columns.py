"""Which columns of the data hold its rows, and what a valid row is.

A row is a text, a prompt with its completion (each a text or a list of messages), or a chat (a list of messages). A
message is {"role", "content"}, plus any texts that the chat template uses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from train_loop.errors import UserError
from train_loop.settings import Settings

Messages = list[dict[str, str]]
Row = str | Messages | tuple[Any, Any]  # a text; a chat; a prompt and its completion

TEXT, PROMPT, CHAT = "text", "prompt + completion", "chat"  # kinds of rows
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class RowColumns:
    """The columns that are read, and the kind of row that they make."""

    names: tuple[str, ...]
    kind: str = TEXT

    def row_of(self, values: Sequence[Any]) -> tuple[Row, str]:
        """(row, "") from the cells of the columns, or ("", the problem with them)."""
        problem = ""
        if self.kind == TEXT:
            problem = _problem_of_text(self.names[0], values[0])
            return ("", problem) if problem else (values[0], "")
        if self.kind == CHAT:
            problem = _problem_of_messages(self.names[0], values[0])
            if not problem and all(message["role"] != "assistant" for message in values[0]):
                problem = f"no message of {self.names[0]!r} is the assistant's: there is nothing to learn in it"
            return ("", problem) if problem else (_messages(values[0]), "")
        is_chat = isinstance(values[0], list)
        for name, value in zip(self.names, values, strict=True):
            problem = problem or (_problem_of_messages if is_chat else _problem_of_text)(name, value)
        prompt, completion = values
        if not problem and not (completion if is_chat else completion.strip()):
            problem = f"{self.names[1]!r} is empty"
        if not problem and is_chat and completion[0]["role"] != "assistant":
            problem = f"the first message of {self.names[1]!r} is not the assistant's"
        if problem:
            return "", problem
        return (_messages(prompt), _messages(completion)) if is_chat else (prompt, completion), ""


def columns_meant(
    names: list[str], texts: list[str], chats: list[str], settings: Settings, where: str = "the data"
) -> RowColumns:
    """`text_column` if set, else the first of: "text", "prompt" and "completion", "messages", the only text column.

    `names`: all columns. `texts`, `chats`: those that seem to hold texts, or lists of messages. `where`: the data's
    name in the message. Raises UserError if there is no such column, or if the choice is ambiguous.
    """
    meant = settings.text_column
    if meant and len({*meant}) < len(meant):
        raise UserError(
            f"text_column names {meant[0]!r} twice: give one column of text, or a prompt's and a completion's"
        )
    if not meant:
        if "text" in names:
            meant = ["text"]
        elif {"prompt", "completion"} <= {*names}:
            meant = ["prompt", "completion"]
        elif "messages" in chats or ("messages" in names and "messages" not in texts):
            meant = ["messages"]
        else:
            meant = texts if len(texts) == 1 else []
    if not meant or not {*meant} <= {*names}:
        missing = ", ".join(repr(name) for name in meant if name not in names)
        wanted = f"no column {missing} of text" if meant else "not just one column of text"
        raise UserError(
            f"{where} has {wanted}; text_column may be one of: {', '.join(texts + chats) or 'none is text'}"
        )
    if len(meant) == 2:
        return RowColumns(tuple(meant), PROMPT)
    # a column named messages may have wrong rows: each is reported with its line
    is_chat = meant[0] in chats or (meant == ["messages"] and meant[0] not in texts)
    return RowColumns(tuple(meant), CHAT if is_chat else TEXT)


def texts_of(row: Row) -> list[str]:
    """The texts of a row, as they were written."""
    if isinstance(row, str):
        return [row]
    if isinstance(row, tuple):
        return [text for part in row for text in texts_of(part)]
    return [message["content"] for message in row]


def num_characters(cell: Any) -> int:
    """Characters in all texts of a cell or row."""
    if isinstance(cell, str):
        return len(cell)
    parts = cell.values() if isinstance(cell, dict) else cell if isinstance(cell, (list, tuple)) else ()
    return sum(map(num_characters, parts))


def _problem_of_text(name: str, value: Any) -> str:
    return "" if isinstance(value, str) else f"{name!r} is {'null' if value is None else 'no text'}"


def _problem_of_messages(name: str, value: Any) -> str:
    if not isinstance(value, list):
        return f"{name!r} is {'null' if value is None else 'no list of messages'}"
    for number, message in enumerate(value, start=1):
        where = f"message {number} of {name!r}"
        if not isinstance(message, dict):
            return f"{where} is no object with role and content"
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            what = "has no role" if role is None else f"has the role {role!r}, which is not known"
            return f"{where} {what}; roles are {', '.join(ROLES)}"
        if message.get("tool_calls"):
            return f"{where} has tool_calls, which are not supported"
        if not isinstance(content, str):
            return f"{where} has {'no content' if content is None else 'a content that is no text'}"
        if role == "assistant" and not content.strip():
            return f"{where}: the assistant's answer is empty"
    return "" if value else f"{name!r} has no messages"


def _messages(value: list[dict[str, Any]]) -> Messages:
    """Messages with their text values only: a table gives null to keys that a message lacks."""
    return [{key: text for key, text in message.items() if isinstance(text, str)} for message in value]
