"""PTX text as tokens. Every token knows where it stands, so that text which nobody changes stays as it was."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from missile.errors import UnsupportedError

__all__ = ["Token", "TokenKind", "tokenize"]


class TokenKind(StrEnum):
    DIRECTIVE = "directive"  # .reg, .loc, .param
    NAME = "name"  # opcodes with their modifiers, registers, labels, symbols
    NUMBER = "number"
    STRING = "string"
    PUNCTUATION = "punctuation"


@dataclass(frozen=True, slots=True)
class Token:
    """text is source[start:end]. line: counted from 1. Comments and white space are no tokens."""

    kind: TokenKind
    text: str
    start: int
    line: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


_WORD = r"[A-Za-z_$%][A-Za-z0-9_$]*"
_TOKEN = re.compile(
    rf"""
    (?P<space>[ \t\r\n]+ | //[^\n]* | /\*.*?\*/)
  | (?P<directive>\.[A-Za-z_][A-Za-z0-9_]*(?:::[A-Za-z0-9_]+)*)
  | (?P<name>{_WORD}(?:(?:\.|::)[A-Za-z0-9_]+)*)
  | (?P<number>0[fFdD][0-9A-Fa-f]+ | 0[xX][0-9A-Fa-f]+U? | 0[bB][01]+U? | \d+\.\d+(?:[eE][+-]?\d+)? | \d+U?)
  | (?P<string>"(?:[^"\\]|\\.)*")
  | (?P<punctuation>[{{}}()\[\]<>,;:@!|+\-=*~&^?/])
    """,
    re.VERBOSE | re.DOTALL,
)


def tokenize(source: str, name: str) -> tuple[Token, ...]:
    """All tokens of `source`. UnsupportedError naming kernel `name` and the line of what is none."""
    tokens: list[Token] = []
    position, line = 0, 1
    while position < len(source):
        match = _TOKEN.match(source, position)
        if match is None:
            raise UnsupportedError(
                f"Kernel {name!r}: line {line} of its PTX has {source[position]!r}, which is not known there."
            )
        if match.lastgroup != "space":
            tokens.append(Token(TokenKind(str(match.lastgroup)), match[0], position, line))
        line += match[0].count("\n")
        position = match.end()
    return tuple(tokens)
