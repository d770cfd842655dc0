"""JSON read a value at a time from a file of any size: memory holds one value and a piece of the file."""

import codecs
import json
from typing import BinaryIO

from finetune.data.sources.lines import encoding_hint
from finetune.errors import DataError

PIECE_BYTES = 1 << 20
LONGEST_TOKEN = 16  # characters of a literal or an escape that a piece may cut
BLANKS = " \t\r\n"


class Scanner:
    def __init__(self, stream: BinaryIO, name: str):
        self._stream, self._name = stream, name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._values = json.JSONDecoder(parse_constant=_refuse_constant)
        self._text, self._place, self._line, self._is_complete = "", 0, 1, False

    @property
    def where(self) -> str:
        return f"{self._name}:{self._line + self._text.count(chr(10), 0, self._place)}"

    def peek(self) -> str:
        """The next character that is not blank; empty at the end of the file."""
        while True:
            rest = self._text[self._place : self._place + LONGEST_TOKEN].lstrip(BLANKS)
            if rest:
                self._place = self._text.index(rest[0], self._place)
                return rest[0]
            self._place = min(self._place + LONGEST_TOKEN, len(self._text))
            if self._place == len(self._text) and not self._more():
                return ""

    def skip(self, *expected: str) -> str:
        """Takes the next character, which must be one of these."""
        if (sign := self.peek()) not in expected or not sign:
            found = f"`{sign}`" if sign else "the end of the file"
            raise self.error(f"bad JSON: {' or '.join(f'`{each}`' for each in expected)} is expected, not {found}")
        self._place += 1
        return sign

    def value(self) -> tuple[object, str]:
        """The next value, and its text."""
        self.peek()
        while True:
            try:
                value, end = self._values.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - LONGEST_TOKEN
                if not (is_cut and self._more()):
                    self._place = min(error.pos, len(self._text))
                    raise self.error(f"bad JSON: {error.msg}") from error
                continue
            except _ConstantError as error:
                raise self.error(f"bad JSON: has `{error}`, which is no JSON number") from error
            except RecursionError as error:
                raise self.error("bad JSON: is nested too deep") from error
            if end == len(self._text) and self._more():  # a number may go on
                continue
            text, self._place = self._text[self._place : end], end
            return value, text

    def error(self, message: str) -> DataError:
        return DataError(message, where=self.where, hint="write or fetch the file again")

    def _more(self) -> bool:
        """Reads on, as much as is held; what was read of it is forgotten."""
        if self._is_complete:
            return False
        piece = self._stream.read(max(PIECE_BYTES, len(self._text) - self._place))
        self._is_complete = not piece
        self._line += self._text.count("\n", 0, self._place)
        try:
            decoded = self._decoder.decode(piece, final=self._is_complete)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n", self._place) + error.object.count(b"\n", 0, error.start)
            where = f"{self._name}:{line}"
            raise DataError("is not UTF-8 text", where=where, hint=encoding_hint(piece)) from error
        self._text, self._place = self._text[self._place :] + decoded, 0
        return True


class _ConstantError(ValueError):
    """JSON has no NaN and no infinity."""


def _refuse_constant(name: str) -> object:
    raise _ConstantError(name)
