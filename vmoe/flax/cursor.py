"""A cursor over one msgpack file: reads header by header, and skips any value without looking inside.

msgpack's own Unpacker has to hold a whole extension object in memory, even to skip it, and allocates containers by
the length that they claim; the data files are gigabytes of extension objects and come from strangers. Nothing here
allocates by a claimed length, recurses, or reads past the end. The file is read, not mapped: a mapped file that shrinks
while it is read kills the process with SIGBUS, and its pages count as the process's memory.

Source: https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from vmoe.errors import CheckpointError

# Chosen: a few seconds of reading. The index of a 15B train state, 128 chunks per expert array, has 0.7 million.
MAX_VALUES = 2**22
# Chosen: the longest name in the reference's trees has about 80 characters.
MAX_TEXT_BYTES = 1024

# First byte -> kind of value, and the struct format of what follows: a number, or a length (ext: length and type code).
_FORMATS = {
    **{0xC4: ("bin", ">B"), 0xC5: ("bin", ">H"), 0xC6: ("bin", ">I")},
    **{0xC7: ("ext", ">Bb"), 0xC8: ("ext", ">Hb"), 0xC9: ("ext", ">Ib")},
    **{0xCA: ("float", ">f"), 0xCB: ("float", ">d")},
    **{0xCC: ("int", ">B"), 0xCD: ("int", ">H"), 0xCE: ("int", ">I"), 0xCF: ("int", ">Q")},
    **{0xD0: ("int", ">b"), 0xD1: ("int", ">h"), 0xD2: ("int", ">i"), 0xD3: ("int", ">q")},
    **{0xD9: ("str", ">B"), 0xDA: ("str", ">H"), 0xDB: ("str", ">I")},
    **{0xDC: ("array", ">H"), 0xDD: ("array", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I")},
}
_CONSTANTS = {0xC0: ("nil", 0), 0xC2: ("bool", 0), 0xC3: ("bool", 1)}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
# The least number of bytes that one unit of a claimed length takes. Kinds that are absent have no length.
_UNIT_BYTES = {"str": 1, "bin": 1, "ext": 1, "array": 1, "map": 2}


class Header(NamedTuple):
    """The start of a value: all of it for numbers, and only the length for what has contents.

    Attributes:
        kind: nil, bool, int, float, str, bin, ext, array or map.
        value: the number itself; bytes of a str, bin or ext; elements of an array; pairs of a map.
        code: type code of an ext.
    """

    kind: str
    value: int | float
    code: int = 0


class Cursor:
    """A position in one msgpack file. Each method that reads raises CheckpointError if the file says something else."""

    def __init__(self, file: BufferedReader, path: Path, size_bytes: int) -> None:
        self.path = path
        self.parameter = ""  # what is being read, for messages
        self.position = 0
        self._file = file
        self._end = size_bytes
        self._values_left = MAX_VALUES

    def error(self, message: str) -> CheckpointError:
        """An error that says where: file, byte and parameter."""
        parameter = f"parameter {self.parameter}: " if self.parameter else ""
        return CheckpointError(f"{self.path}, byte {self.position}: {parameter}{message}")

    def seek(self, position: int) -> None:
        self._file.seek(position)
        self.position = position

    def read_into(self, buffer: memoryview) -> None:
        """Fills the buffer with the bytes that follow."""
        size_bytes = len(buffer)
        if size_bytes > self._end - self.position:
            raise self.error(f"truncated: {size_bytes} bytes expected, {self._end - self.position} left")
        try:
            found_bytes = self._file.readinto(buffer)
        except OSError as error:
            raise self.error(f"cannot be read: {error}") from error
        if found_bytes != size_bytes:
            raise self.error("the file became shorter while it was read")
        self.position += size_bytes

    def header(self) -> Header:
        """Reads the start of the next value; the cursor then stands at its contents, if it has any."""
        self._values_left -= 1
        if self._values_left < 0:
            raise self.error(f"more than {MAX_VALUES} values in one file")
        start = self.position
        first = self._read(1)[0]
        if first <= 0x7F:
            header = Header("int", first)
        elif first <= 0x8F:
            header = Header("map", first & 0x0F)
        elif first <= 0x9F:
            header = Header("array", first & 0x0F)
        elif first <= 0xBF:
            header = Header("str", first & 0x1F)
        elif first >= 0xE0:
            header = Header("int", first - 0x100)
        elif first in _CONSTANTS:
            header = Header(*_CONSTANTS[first])
        elif first in _FIXED_EXTENSIONS:
            header = Header("ext", _FIXED_EXTENSIONS[first], *struct.unpack(">b", self._read(1)))
        elif first in _FORMATS:
            kind, layout = _FORMATS[first]
            header = Header(kind, *struct.unpack(layout, self._read(struct.calcsize(layout))))
        else:
            raise self.error(f"byte 0x{first:02x} starts no msgpack value")
        if header.value * _UNIT_BYTES.get(header.kind, 0) > self._end - self.position:
            left = self._end - self.position
            self.position = start
            raise self.error(f"truncated: {header.kind} of length {header.value}, but only {left} bytes are left")
        return header

    def skip(self) -> None:
        """Passes over one value with all it contains; extension objects and strings cost one seek each."""
        pending = 1
        while pending:
            kind, value, _ = self.header()
            pending -= 1
            if kind in ("str", "bin", "ext"):
                self.seek(self.position + int(value))
            elif kind == "array":
                pending += int(value)
            elif kind == "map":
                pending += 2 * int(value)

    def integer(self, what: str) -> int:
        return self._expect("int", what)

    def array(self, what: str, length: int | None = None) -> int:
        """The number of elements that follow; when `length` is given it must be that."""
        found = self._expect("array", what)
        if length is not None and found != length:
            raise self.error(f"{what} should have {length} elements, found {found}")
        return found

    def map(self, what: str) -> int:
        """The number of (key, value) pairs that follow."""
        return self._expect("map", what)

    def binary(self, what: str) -> int:
        """The number of raw bytes that follow."""
        return self._expect("bin", what)

    def extension(self, code: int, what: str) -> int:
        """The number of payload bytes that follow."""
        header = self.header()
        if header.kind != "ext" or header.code != code:
            found = f"extension type {header.code}" if header.kind == "ext" else header.kind
            raise self.error(f"{what} should be of extension type {code}, found {found}")
        return int(header.value)

    def text(self, what: str) -> str:
        size_bytes = self._expect("str", what)
        if size_bytes > MAX_TEXT_BYTES:
            raise self.error(f"{what} of {size_bytes} bytes, at most {MAX_TEXT_BYTES} are read")
        try:
            return self._read(size_bytes).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8: {error}") from error

    @contextmanager
    def payload(self, size_bytes: int) -> Iterator[None]:
        """Within the block the file ends after `size_bytes`, and the block must read all of them."""
        outer, self._end = self._end, self.position + size_bytes
        yield
        if self.position != self._end:
            raise self.error(f"{self._end - self.position} bytes too many in an object of {size_bytes} bytes")
        self._end = outer

    def finish(self) -> None:
        """Checks that the file holds nothing more."""
        if self.position != self._end:
            raise self.error(f"{self._end - self.position} bytes follow the end of the msgpack object")

    def _expect(self, kind: str, what: str) -> int:
        header = self.header()
        if header.kind != kind:
            raise self.error(f"{what} should be of msgpack type {kind}, found {header.kind}")
        return int(header.value)

    def _read(self, size_bytes: int) -> bytearray:
        data = bytearray(size_bytes)
        self.read_into(memoryview(data))
        return data


@contextmanager
def open_cursor(path: Path, *, max_bytes: int | None = None) -> Iterator[Cursor]:
    """Opens a file and closes it after the block.

    Raises:
        CheckpointError: there is no such file, it cannot be read, or it is larger than `max_bytes`.
    """
    size_bytes = file_bytes(path)
    if max_bytes is not None and size_bytes > max_bytes:
        raise CheckpointError(f"{path} has {size_bytes} bytes, at most {max_bytes} are read")
    try:
        file = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    with file:
        yield Cursor(file, path, size_bytes)


def file_bytes(path: Path) -> int:
    """Size of a regular file.

    Raises:
        CheckpointError: the file is missing, or a pipe, a device or a directory.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    return found.st_size
