"""The newest points of a run's curves out of its tensorboard files.

Tensorboard's own EventAccumulator reads every point, 14 s for 100,000 steps. Here the files are searched backwards,
the newest first, until there are enough points.
"""

import math
import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

# Around a record: its length with that number's checksum, and its own checksum.
LENGTH, CHECKSUM = struct.Struct("<Q4x"), struct.Struct("<I")


class Point(NamedTuple):
    """A value of a curve, logged at an optimizer step and a time, seconds since 1970."""

    step: int
    time: float
    value: float


@dataclass
class Curves:
    """Points by tag, newest first; how many processes wrote; when the newest of them began and wrote its last."""

    points: dict[str, list[Point]]
    writers: int = 0
    began: float | None = None
    time: float | None = None


def records(content: bytes) -> list[int]:
    """Where the records of an events file begin. What follows a torn or damaged length is left out."""
    found, at = [], LENGTH.size
    while at <= len(content):
        (length,) = LENGTH.unpack_from(content, at - LENGTH.size)
        if at + length + CHECKSUM.size > len(content):
            break  # still being written
        found.append(at)
        at += length + CHECKSUM.size + LENGTH.size
    return found


def parsed(content: bytes, found: list[int]) -> Iterator[Event]:
    """Those of the records that are undamaged."""
    for at in found:
        (length,) = LENGTH.unpack_from(content, at - LENGTH.size)
        record = content[at : at + length]
        if CHECKSUM.unpack_from(content, at + length) == (masked_crc32c(record),):
            try:
                yield Event.FromString(record)
            except DecodeError:
                continue


def newest(directory: Path, wanted: dict[str, int], resumed: tuple[float, int] | None = None) -> Curves:
    """So many of the newest points of each tag. Steps that a resumed run went back behind are no points.

    Args:
        directory: holds one events file of each process that trained.
        wanted: number of points by tag.
        resumed: when a process started that may have no file yet, and at which step.
    """
    curves = Curves({tag: [] for tag in wanted})
    last = math.inf  # the last step that counts
    for file in sorted(directory.glob("events.out.tfevents.*"), reverse=True):
        try:
            content = file.read_bytes()
        except OSError:
            continue
        found = records(content)
        head = list(parsed(content, found[:3]))
        if not head:
            continue
        if curves.began is None:
            curves.began = head[0].wall_time
            curves.time = max(event.wall_time for event in [*head, *parsed(content, found[-1:])])
            if resumed and curves.began < resumed[0]:
                last = resumed[1]
        curves.writers += 1
        _collect(curves.points, wanted, content, found, last)
        for event in head:  # a writer that resumes says from which step on earlier ones were undone
            if event.session_log.status == SessionLog.START:
                last = min(last, event.step - 1)
    return curves


def _collect(
    points: dict[str, list[Point]], wanted: dict[str, int], content: bytes, found: list[int], last: float
) -> None:
    for tag, count in wanted.items():
        end = len(content)
        while len(points[tag]) < count and (at := content.rfind(tag.encode(), 0, end)) >= 0:
            end = found[bisect_right(found, at) - 1]  # of the record that names the tag
            for event in parsed(content, [end]):
                for value in event.summary.value:
                    if value.tag == tag and event.step <= last:
                        points[tag].append(Point(event.step, event.wall_time, value.simple_value))
