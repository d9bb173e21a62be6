"""Finds the text, id and group of a record by the path of a field, such as `data.text` or `files[].content`."""

import re
from pathlib import Path
from typing import Any

SEPARATOR = "\n\n"  # between the strings of a list that make up one text
PATH = re.compile(r"[^.\[\]]+(\[\])?(\.[^.\[\]]+(\[\])?)*")


class NoField(Exception):
    """A record lacks a field; the message says what was expected and what is there."""


class BadChat(Exception):
    """A list is not a chat that the template can render."""


def check_path(name: str, path: str) -> None:
    """Raise ValueError unless `path`, which the option `name` gave, is one."""
    if not PATH.fullmatch(path):
        raise ValueError(f"{name}: found {path!r}, expected a field, or a path like data.text or files[].content")


def column_of(path: str) -> str:
    """Return the outermost field of a path."""
    return path.split(".")[0].removesuffix("[]")


def value_at(record: dict[str, Any], path: str) -> Any:
    """Return the value at a path; a field whose name is the whole path comes first.

    `a.b` is field b of the object in field a. `a[]` stands for all strings of a list, and `a[].b` for field b of all
    objects of a list; they are joined by SEPARATOR.

    Raises:
        NoField: there is no such field.
    """
    if path in record:
        return record[path]
    step, _, rest = path.partition(".")
    name = step.removesuffix("[]")
    if name not in record:
        found = ", ".join(sorted(map(str, record))[:10]) or "nothing"
        raise NoField(f"expected {name!r}, found {found}")
    value = record[name]
    if name == step:
        if not rest:
            return value
        return value_at(_object(value, name), rest)
    if not isinstance(value, list):
        raise NoField(f"expected a list in {name!r}, found {type(value).__name__}")
    parts = [value_at(_object(part, step), rest) for part in value] if rest else value
    odd = next((part for part in parts if not isinstance(part, str)), None)
    return SEPARATOR.join(parts) if odd is None else parts


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise NoField(f"expected an object in {name!r}, found {type(value).__name__}")
    return value


def read_template(path: Path) -> str:
    """Return the Jinja template of a file. Raises ValueError if it is none, OSError if it cannot be read."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        template = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"chat_template: {path} is not UTF-8: {error}") from None
    try:
        render_jinja_template([[]], chat_template=template)
    except TemplateSyntaxError as error:
        raise ValueError(f"chat_template: {path}, line {error.lineno}: {error.message}") from None
    except (TemplateError, TypeError, ValueError, LookupError):  # for want of messages
        pass
    return template


def render_chat(messages: list[Any], template: str) -> str:
    """Return the text of a chat, as `apply_chat_template` of transformers gives it. Raises BadChat."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    if not all(isinstance(message, dict) for message in messages):
        raise BadChat("expected a list of messages, each with its role and content")
    try:
        return render_jinja_template([messages], chat_template=template)[0][0]
    except (TemplateError, TypeError, ValueError) as error:
        raise BadChat(f"the chat template fails: {error}") from None
