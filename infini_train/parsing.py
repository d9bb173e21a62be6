"""The command-line parser of the commands whose options jsonargparse reads from signatures, and what they name."""

import argparse
import os
import re
import sys
from collections.abc import Collection
from typing import Any, NoReturn

import jsonargparse

from infini_train.errors import closest

KNOWN_PACKAGES = ("infini_train", "lightning", "torch")
MISSING = r"the following arguments are required: (?:(fit|validate)\.)?(\S+)"  # jsonargparse's message


def foreign_classes(options: Any) -> set[str]:
    """Return the classes of other packages than infini_train, lightning and torch that a configuration names.

    Args:
        options: the configuration, parsed or not: dictionaries, namespaces and lists, however deep.
    """
    if isinstance(options, list | tuple):
        return set().union(*map(foreign_classes, options))
    if isinstance(options, jsonargparse.Namespace):
        options = vars(options)
    if not isinstance(options, dict):
        return set()
    name = options.get("class_path")
    own = {name} if isinstance(name, str) and name.split(".")[0] not in KNOWN_PACKAGES else set()
    return own.union(*map(foreign_classes, options.values()))


def plain(message: str, options: Collection[str]) -> str:
    """Say in one line what jsonargparse reports; a message of another kind stays as it is.

    Args:
        message: jsonargparse's own, which speaks of parser keys, Unions and Literals.
        options: the parser's options, such as `--trainer.max_steps`.
    """
    if found := re.fullmatch(r"unrecognized arguments: (\S+).*", message, re.DOTALL):
        return message + closest(found[1], options)
    refused = r"(?:Subcommand '\w+' does not accept o|Group '(\S+)' does not accept o|O)ption '(\S+)'(?: is not .*)?"
    if found := re.fullmatch(refused, message):
        name = ".".join(filter(None, found.groups()))
        return f"unknown option {name}{closest(f'--{name}', options).replace('--', '')}"
    found = re.fullmatch(MISSING, message)
    if found and f"--{found[2]}" in options:  # arguments without a name keep jsonargparse's message
        return f"option --{found[2]} is required"
    if found := re.fullmatch(r"Problems parsing config: (.*)", message, re.DOTALL):
        return f"configuration file: {' '.join(found[1].split())}"
    if found := re.fullmatch(r'Parser key "(\S+)": (File does not exist: .*)', message):
        return f"{found[1]}: {found[2][0].lower()}{found[2][1:]}"
    of_types = r'Parser key "(\S+)":\s+Does not validate .*\s+Subtypes: \[(.*?)\]\n.*Given value: (.*)'
    of_type = r'Parser key "(\S+)":\s+Expected a (.*)\. Got value: (.*)'
    found = re.fullmatch(of_types, message, re.DOTALL) or re.fullmatch(of_type, message)
    expected = _expected(found[2]) if found else None
    return f"{found[1]}: found {found[3]}, expected {expected}" if found and expected else message


def _expected(types: str) -> str | None:
    """Turn types that are listed as Python writes them into words; None if there are others than the usual ones."""
    literal, simple = r"(?:typing\.)?Literal\[([^\]]*)\]", r"<class '(\w+)'>"
    if re.sub(f"{literal}|{simple}|,", "", types).strip():
        return None
    names = [name for both in re.findall(f"{literal}|{simple}", types) for name in (both[0] or both[1]).split(", ")]
    words = dict.fromkeys("null" if name == "NoneType" else name.strip("'") for name in names)
    return f"one of {', '.join(words)}" if len(words) > 1 else next(iter(words))


class Parser(jsonargparse.ArgumentParser):
    """Reports errors in the form that argparse, and so every other command, uses."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print `PROGRAM: error: MESSAGE`, without the usage of a hundred options, and exit with code 2."""
        if os.environ.get("INFINI_TRACEBACK"):
            raise argparse.ArgumentError(None, message) from ex
        parser = getattr(ex, "subcommand_parser", None) or self._called(message)
        message = plain(message, parser._option_string_actions)
        print(f"{parser.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)

    def _called(self, message: str) -> "jsonargparse.ArgumentParser":
        """The parser of the subcommand of which the message names a missing option, or this one."""
        missing, subcommands = re.fullmatch(MISSING, message), self._subcommands_action
        return subcommands.choices[missing[1]] if missing and missing[1] and subcommands else self
