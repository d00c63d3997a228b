"""Large weights of an ONNX file apart from the rest of its bytes, so that reading and writing copy them once or never.

An ``.onnx`` file is one protobuf message. Parsed as a whole, each weight lies in memory twice (file and message), and
once more for each of the two steps of writing. Here only the message *around* the weights is parsed or serialized: the
``raw_data`` of the main graph's large initializers is cut out of the bytes, and laid back between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, TypeAlias

from ..errors import ModelFileError

Part: TypeAlias = Any
"""Bytes, or a stand-in for data that is written later; only its length is needed here."""
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
"""Field numbers of ModelProto.graph, GraphProto.initializer and TensorProto.raw_data."""
_LENGTH = 2
"""Wire type of a field that begins with its length."""


def _varint(data: Any, at: int) -> tuple[int, int]:
    """(number, position after it)."""
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7


def _as_varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _fields(data: Any, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, where its tag begins, where its content begins, where it ends) of each field of one message."""
    at = start
    while at < end:
        tag = at
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _LENGTH:
            length, at = _varint(data, at)
            stop = at + length
        elif wire == 0:
            _, stop = _varint(data, at)
        elif wire in (1, 5):
            stop = at + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"wire type {wire} at byte {tag}")
        if stop > end:
            raise ValueError(f"a field at byte {tag} ends at byte {stop}, past its message, which ends at {end}")
        yield key >> 3, tag, at, stop
        at = stop


def _message(number: int, parts: Sequence[Sized]) -> list[Part]:
    """A field of that number that holds the parts."""
    return [_as_varint(number << 3 | _LENGTH) + _as_varint(sum(len(p) for p in parts)), *parts]


def lift(data: Any, least: int) -> tuple[bytes, dict[int, tuple[int, int]]]:
    """Cut the large weights out of a serialized ModelProto.

    Args:
        data: the file: bytes, or a memory map, of which only what is around the weights is read.
        least: ``raw_data`` from this many bytes on is cut out.

    Returns:
        The message with that ``raw_data`` empty, and where it was: position among the main graph's initializers ->
        (first byte, end) in ``data``. Nothing is cut out of a message that spells a field in several parts.

    Raises:
        ModelFileError: the bytes are no protobuf message.
    """
    try:
        graphs = [f for f in _fields(data, 0, len(data)) if f[0] == GRAPH]
        if len(graphs) != 1:
            return bytes(data), {}
        _, tag, start, end = graphs[0]
        large: dict[int, tuple[int, int]] = {}
        parts: list[Part] = []
        copied, position = start, 0
        for number, head, inside, stop in _fields(data, start, end):
            if number != INITIALIZER:
                continue
            if stop - inside >= least:
                raw = [f for f in _fields(data, inside, stop) if f[0] == RAW_DATA]
                if len(raw) == 1 and raw[0][3] - raw[0][2] >= least:
                    _, before, first, last = raw[0]
                    large[position] = first, last
                    empty: list[Part] = [data[inside:before], *_message(RAW_DATA, []), data[last:stop]]
                    parts += [data[copied:head], *_message(INITIALIZER, empty)]
                    copied = stop
            position += 1
        parts.append(data[copied:end])
    except (ValueError, IndexError) as error:
        raise ModelFileError("not an ONNX file, or a truncated one", found=str(error)) from error
    return b"".join([data[:tag], *_message(GRAPH, parts), data[end:]]), large


def lay(small: bytes, large: Mapping[int, Sized]) -> list[Part]:
    """The inverse of :func:`lift`, as parts to write one after the other; ``small`` holds empty ``raw_data`` fields.

    With ``small`` as protobuf serializes it, the parts together are what it would have made of the whole message.
    """
    if not large:
        return [small]
    _, tag, start, end = next(f for f in _fields(small, 0, len(small)) if f[0] == GRAPH)
    parts: list[Part] = []
    copied, position = start, 0
    for number, head, inside, stop in _fields(small, start, end):
        if number != INITIALIZER:
            continue
        if position in large:
            _, before, _, last = next(f for f in _fields(small, inside, stop) if f[0] == RAW_DATA)
            tensor = [small[inside:before], *_message(RAW_DATA, [large[position]]), small[last:stop]]
            parts += [small[copied:head], *_message(INITIALIZER, tensor)]
            copied = stop
        position += 1
    parts.append(small[copied:end])
    return [small[:tag], *_message(GRAPH, parts), small[end:]]
