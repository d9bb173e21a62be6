"""Finds the text, id and group of a record by the path of a field, such as `data.text` or `files[].content`."""

import re
from collections.abc import Callable
from pathlib import Path
from string import Formatter
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


class Heading:
    """A line before each of the documents that are joined, with fields of it in braces, such as `# file: {path}`.

    Raises ValueError if `template` is none.
    """

    def __init__(self, template: str) -> None:
        try:
            self._parts = list(Formatter().parse(template))
        except ValueError as error:
            raise ValueError(f"heading: found {template!r}: {error}") from None
        self.fields = [field for _, field, _, _ in self._parts if field is not None]
        if not self.fields or any(part[2] or part[3] for part in self._parts):
            raise ValueError(f"heading: found {template!r}, expected a field in braces, such as '# file: {{path}}'")
        for field in self.fields:
            check_path("heading", field)

    def of(self, value: Callable[[str], Any]) -> str:
        """Return the line, with its end, of a document whose fields `value` returns. Raises NoField."""
        line = ""
        for before, field, _, _ in self._parts:
            line += before
            if field is not None:
                found = value(field)
                if not isinstance(found, str | int):
                    raise NoField(f"expected a string in {field!r} for the heading, found {type(found).__name__}")
                line += str(found)
        return f"{line}\n"

    def of_record(self, record: dict[str, Any]) -> str:
        return self.of(lambda field: value_at(record, field))

    def of_path(self, path: str) -> str:
        """Return the line of a file, which has no other field than its path."""
        return self.of(lambda field: value_at({"path": path}, field))


def texts_with_headings(record: dict[str, Any], path: str, heading: Heading) -> Any:
    """Return the value at a path like `files[].content`, with the heading of its object before each string."""
    above, _, rest = path.partition("[].")
    value = value_at(record, above)
    if not isinstance(value, list):
        raise NoField(f"expected a list in {above!r}, found {type(value).__name__}")
    objects = [_object(part, path) for part in value]
    texts = [value_at(part, rest) for part in objects]
    if any(not isinstance(text, str) for text in texts):
        return texts
    return SEPARATOR.join(heading.of_record(part) + text for part, text in zip(objects, texts, strict=True))


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
