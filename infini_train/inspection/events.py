"""Reads a run's curves from its TensorBoard files: the newest points of some, or everything.

TensorBoard's own EventAccumulator reads every point, which takes 14 s for 100,000 steps. `newest` searches the files
backwards, the newest file first, and stops when it has enough points. `history` reads everything, for a report.
"""

import math
import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

# A record is preceded by its length and that number's checksum, and followed by its own checksum.
LENGTH, CHECKSUM = struct.Struct("<Q4x"), struct.Struct("<I")


class Point(NamedTuple):
    """A value of a curve, logged at an optimizer step and at a time in seconds since 1970."""

    step: int
    time: float
    value: float


@dataclass
class Curves:
    """Points by tag, newest first, and the processes that wrote them. Times are in seconds since 1970."""

    points: dict[str, list[Point]]
    writers: int = 0  # number of processes that wrote a file
    began: float | None = None  # when the newest of them started
    time: float | None = None  # when it wrote its last event


@dataclass
class History:
    """All that a run has logged, without what a resumed process did again.

    Attributes:
        points: the points of each curve by tag, by step.
        images: the last image of each tag: its step and the bytes of a PNG file.
        texts: steps and texts by tag, by step.
        resumed: the steps from which later processes continued, in order.
    """

    points: dict[str, list[Point]] = field(default_factory=dict)
    images: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    texts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    resumed: list[int] = field(default_factory=list)


def records(content: bytes) -> list[int]:
    """Return the offsets of the records of an events file, up to the first length that is torn or damaged."""
    found, at = [], LENGTH.size
    while at <= len(content):
        (length,) = LENGTH.unpack_from(content, at - LENGTH.size)
        if at + length + CHECKSUM.size > len(content):
            break  # still being written
        found.append(at)
        at += length + CHECKSUM.size + LENGTH.size
    return found


def crc32c_table() -> list[int]:
    """Return the CRC-32C (Castagnoli) of every byte."""
    table = list(range(256))
    for _ in range(8):
        table = [crc >> 1 ^ 0x82F63B78 if crc & 1 else crc >> 1 for crc in table]
    return table


CRC_TABLE = crc32c_table()


def masked_crc32c(data: bytes) -> int:
    """Return the checksum of the record format. TensorBoard's own function takes 0.2 s to import."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def parsed(content: bytes, found: list[int]) -> Iterator[Event]:
    """Yield the events of those records that are undamaged."""
    for at in found:
        (length,) = LENGTH.unpack_from(content, at - LENGTH.size)
        record = content[at : at + length]
        if CHECKSUM.unpack_from(content, at + length) == (masked_crc32c(record),):
            try:
                yield Event.FromString(record)
            except DecodeError:
                continue


def newest(directory: Path, wanted: dict[str, int], resumed: tuple[float, int] | None = None) -> Curves:
    """Read the newest points of each tag, without those of steps that a resumed run did again.

    Args:
        directory: holds one events file for each process that trained.
        wanted: number of points by tag.
        resumed: time and step at which a process started that may not have written a file yet.
    """
    curves = Curves({tag: [] for tag in wanted})
    last = math.inf  # the last step that no later process did again
    for content, found, head in _files(directory):
        if curves.began is None:
            curves.began = head[0].wall_time
            curves.time = max(event.wall_time for event in [*head, *parsed(content, found[-1:])])
            if resumed and curves.began < resumed[0]:
                last = resumed[1]
        curves.writers += 1
        _collect(curves.points, wanted, content, found, last)
        last = min(last, _resumed_at(head))
    return curves


def history(directory: Path) -> History:
    """Read everything that a run has logged to the events files in a directory.

    Of a step that was logged twice, for instance in a validation that was cut off, the later value counts.
    """
    curves: dict[str, dict[int, Point]] = {}
    texts: dict[str, dict[int, str]] = {}
    images: dict[str, tuple[int, bytes]] = {}
    resumed: set[int] = set()
    last = math.inf  # the last step that no later process did again
    for content, found, head in _files(directory):
        own: dict[str, dict[int, Point]] = {}
        for event in parsed(content, found):
            if event.step > last:
                continue
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                if kind == "simple_value":
                    own.setdefault(value.tag, {})[event.step] = Point(event.step, event.wall_time, value.simple_value)
                elif kind == "image" and event.step > images.get(value.tag, (-1, b""))[0]:
                    images[value.tag] = event.step, value.image.encoded_image_string
                elif kind == "tensor" and value.metadata.plugin_data.plugin_name == "text":
                    text = b"".join(value.tensor.string_val).decode(errors="replace")
                    texts.setdefault(value.tag, {}).setdefault(event.step, text)
        for tag, points in own.items():
            curves[tag] = points | curves.get(tag, {})
        last = min(last, _resumed_at(head))
        if 0 < last < math.inf:
            resumed.add(int(last))
    return History(
        {tag: sorted(points.values()) for tag, points in sorted(curves.items())},
        images,
        {tag: sorted(found.items()) for tag, found in sorted(texts.items())},
        sorted(resumed),
    )


def _files(directory: Path) -> Iterator[tuple[bytes, list[int], list[Event]]]:
    """Yield the content, the records and the first events of each readable file, the newest file first."""
    for file in sorted(directory.glob("events.out.tfevents.*"), reverse=True):
        try:
            content = file.read_bytes()
        except OSError:
            continue
        found = records(content)
        if head := list(parsed(content, found[:3])):
            yield content, found, head


def _resumed_at(head: list[Event]) -> float:
    """Return the last step that a resumed process does not do again: it logs the one after it first."""
    starts = [event.step - 1 for event in head if event.session_log.status == SessionLog.START]
    return min(starts, default=math.inf)


def _collect(
    points: dict[str, list[Point]], wanted: dict[str, int], content: bytes, found: list[int], last: float
) -> None:
    for tag, count in wanted.items():
        end = len(content)
        while len(points[tag]) < count and (at := content.rfind(tag.encode(), 0, end)) >= 0:
            end = found[bisect_right(found, at) - 1]  # the record that holds the tag
            for event in parsed(content, [end]):
                for value in event.summary.value:
                    if value.tag == tag and event.step <= last:
                        points[tag].append(Point(event.step, event.wall_time, value.simple_value))
