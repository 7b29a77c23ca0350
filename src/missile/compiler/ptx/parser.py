"""PTX text to its syntax tree: the language that Triton's compiler writes, statement by statement.

What is not known is refused with the kernel's name and the line: a rewriter that skips what it does not understand would
let an access through untranslated.
"""

from __future__ import annotations

from missile.compiler.ptx.syntax import (
    Address,
    Declaration,
    Function,
    Immediate,
    Instruction,
    Label,
    Module,
    Name,
    Operand,
    Other,
    Pair,
    Parameter,
    Scope,
    Statement,
    Vector,
)
from missile.compiler.ptx.tokens import Token, TokenKind, tokenize
from missile.errors import UnsupportedError

__all__ = ["FIRST_VERSION", "LAST_VERSION", "parse"]

FIRST_VERSION = (7, 0)
LAST_VERSION = (9, 0)

_LINKING = frozenset({".visible", ".extern", ".weak", ".common"})
_SPACES = frozenset({".reg", ".shared", ".local", ".param", ".global", ".const"})
_LINES = frozenset({".loc", ".file"})  # these end with their line, not with a semicolon
_TUNING = frozenset(
    {
        ".maxntid", ".reqntid", ".minnctapersm", ".maxnctapersm", ".maxnreg", ".noreturn", ".explicitcluster",
        ".reqnctapercluster", ".maxclusterrank", ".blocksareclusters",
    }
)  # fmt: skip
_WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


def parse(source: str, name: str = "") -> Module:
    """Parse one PTX file. `name` is what errors call it until a function's own name is known.

    UnsupportedError, in one sentence, for a PTX version or a construct that is not known.
    """
    return _Parser(source, name).module()


class _Parser:
    def __init__(self, source: str, name: str) -> None:
        self._source = source
        self._kernel = name
        self._tokens = tokenize(source, name)
        self._at = 0

    # --- module level
    def module(self) -> Module:
        version = self._version()
        self._expect(".target")
        target = self._next().text
        while self._accept(","):
            self._next()
        head_end = self._tokens[self._at - 1].end
        if self._accept(".address_size"):
            size = self._next()
            head_end = size.end
            if size.text != "64":
                raise self._refuse(f"has {size.text}-bit addresses; 64-bit ones are known", size)
        functions: list[Function] = []
        variables: list[Declaration] = []
        notes: list[Other] = []
        while (token := self._peek()) is not None:
            start = token.start
            while self._peek_text() in _LINKING:
                self._next()
            keyword = self._peek_text()
            if keyword in (".entry", ".func"):
                functions.append(self._function(start))
            elif keyword in _SPACES:
                variables.append(self._declaration())
            elif keyword in _LINES:
                notes.append(self._line())
            elif keyword == ".section":
                notes.append(self._section())
            elif keyword == ".pragma":
                notes.append(self._until_semicolon())
            else:
                raise self._unknown()
        return Module(self._source, version, target, tuple(functions), tuple(variables), head_end, tuple(notes))

    def _version(self) -> tuple[int, int]:
        self._expect(".version")
        token = self._next()
        major, _, minor = token.text.partition(".")
        if not (major.isdigit() and minor.isdigit()):
            raise self._refuse(f"has the PTX version {token.text!r}, which is none", token)
        version = int(major), int(minor)
        if not FIRST_VERSION <= version <= LAST_VERSION:
            known = f"{FIRST_VERSION[0]}.{FIRST_VERSION[1]} to {LAST_VERSION[0]}.{LAST_VERSION[1]}"
            raise UnsupportedError(f"Kernel {self._kernel!r} is PTX version {token.text}; {known} are known.")
        return version

    def _function(self, start: int) -> Function:
        entry = self._next().text == ".entry"
        if not entry and self._peek_text() == "(":
            self._parameters()  # what it returns
        named = self._next()
        self._kernel = name = named.text
        parameters: tuple[Parameter, ...] | None = None
        parameters_end = named.end
        if self._peek_text() == "(":
            parameters = self._parameters()
            parameters_end = self._tokens[self._at - 1].start
        while self._peek_text() in _TUNING:
            self._next()
            while self._peek_kind() is TokenKind.NUMBER or self._peek_text() == ",":
                self._next()
        if self._peek_text() == ";":
            return Function(name, entry, parameters or (), None, start, self._next().end)
        opening = self._expect("{")
        body, end = self._statements()
        return Function(
            name, entry, parameters or (), body, start, end, opening.end, parameters_end, parameters is not None
        )

    def _parameters(self) -> tuple[Parameter, ...]:
        self._expect("(")
        found = []
        while not self._accept(")"):
            if self._next().text not in (".param", ".reg"):
                raise self._unknown(-1)
            kind, pointer = "", False
            while self._peek_kind() is TokenKind.DIRECTIVE:
                word = self._next().text
                if word == ".align":
                    self._integer()
                elif word == ".ptr":
                    pointer = self._peek_text() == ".global"
                elif not kind and word[1:2] in "bsufp" and word != ".param":
                    kind = word[1:]
            name = self._next().text
            nbytes = self._width(kind)
            if self._accept("["):
                nbytes *= self._integer()
                self._expect("]")
            found.append(Parameter(name, kind, nbytes, pointer))
            if self._peek_text() != ")":
                self._expect(",")
        return tuple(found)

    # --- statements
    def _statements(self) -> tuple[tuple[Statement, ...], int]:
        """Statements up to the closing brace, and where that ends."""
        found: list[Statement] = []
        while True:
            token = self._peek()
            if token is None:
                raise self._refuse("ends in the middle of a function")
            if token.text == "}":
                return tuple(found), self._next().end
            found.append(self._statement(token))

    def _statement(self, token: Token) -> Statement:
        if token.text == "{":
            self._next()
            statements, end = self._statements()
            return Scope(statements, token.start, end)
        if token.text in _SPACES:
            return self._declaration()
        if token.text in _LINES:
            return self._line()
        if token.text == ".pragma":
            return self._until_semicolon()
        if token.text == "@" or token.kind is TokenKind.NAME:
            after = self._tokens[self._at + 1] if self._at + 1 < len(self._tokens) else None
            if token.kind is TokenKind.NAME and after is not None and after.text == ":":
                self._at += 2
                if self._peek_text() in (".branchtargets", ".callprototype", ".calltargets"):
                    raise self._refuse("branches or calls through a table", self._peek())
                return Label(token.text, token.start, after.end)
            return self._instruction(token)
        raise self._unknown()

    def _instruction(self, first: Token) -> Instruction:
        guard = None
        if self._accept("@"):
            negated = self._accept("!")
            name = self._next()
            guard = Name(name.text, first.start, name.end, negated)
        opcode = self._next()
        if opcode.kind is not TokenKind.NAME:
            raise self._unknown(-1)
        operands: list[Operand] = []
        while self._peek_text() != ";":
            operands.append(self._operand())
            if self._peek_text() != ";":
                self._expect(",")
        return Instruction(opcode.text, tuple(operands), guard, first.start, self._next().end, first.line)

    def _declaration(self) -> Declaration:
        start = self._peek_or_fail().start
        space = self._next().text[1:]
        kind = ""
        while self._peek_kind() is TokenKind.DIRECTIVE:
            word = self._next().text
            if word == ".align":
                self._integer()
            elif word == ".attribute":
                raise self._refuse("declares memory with an attribute", self._tokens[self._at - 1])
            elif not word.startswith(".v") and self._is_type(word[1:]):
                kind = word[1:]
        names: list[tuple[str, int]] = []
        nbytes = 0
        while True:
            token = self._next()
            if token.kind is not TokenKind.NAME:
                raise self._unknown(-1)
            count = 1
            if self._accept("<"):
                count = self._integer()
                self._expect(">")
                names.append((token.text, count))
            else:
                names.append((token.text, 0))
            elements = 1
            while self._accept("["):
                elements *= 0 if self._peek_text() == "]" else self._integer()
                self._expect("]")
            nbytes = self._width(kind) * elements if space != "reg" else 0
            if self._accept("="):
                self._skip_initializer()
            if not self._accept(","):
                break
        end = self._expect(";").end
        return Declaration(space, kind, tuple(names), start, end, nbytes)

    def _skip_initializer(self) -> None:
        depth = 0
        while (text := self._peek_or_fail().text) not in (";", ",") or depth:
            depth += (text in "{(") - (text in "})")
            self._next()

    def _line(self) -> Other:
        first = self._next()
        end = first.end
        while (token := self._peek()) is not None and token.line == first.line:
            end = self._next().end
        return Other(first.text, first.start, end)

    def _until_semicolon(self) -> Other:
        first = self._next()
        while self._next().text != ";":
            pass
        return Other(first.text, first.start, self._tokens[self._at - 1].end)

    def _section(self) -> Other:
        first = self._next()
        while self._next().text != "{":
            pass
        while self._next().text != "}":
            pass
        return Other(first.text, first.start, self._tokens[self._at - 1].end)

    # --- operands
    def _operand(self) -> Operand:
        token = self._peek_or_fail()
        if token.text in ("{", "("):
            closing = "}" if token.text == "{" else ")"
            self._next()
            items: list[Operand] = []
            while self._peek_text() != closing:
                items.append(self._operand())
                if self._peek_text() != closing:
                    self._expect(",")
            return Vector(tuple(items), token.start, self._next().end)
        if token.text == "[":
            return self._address()
        if token.text == "!":
            self._next()
            name = self._next()
            return Name(name.text, token.start, name.end, True)
        if token.kind is TokenKind.NUMBER or token.text in "+-":
            return self._immediate()
        if token.kind is not TokenKind.NAME:
            raise self._unknown()
        self._next()
        operand = Name(token.text, token.start, token.end)
        if self._accept("|"):
            second = self._operand()
            return Pair(operand, second, token.start, second.end)
        if self._peek_text() == "+":  # a symbol plus a constant, as in `mov.u64 %rd1, table+8`
            raise self._refuse("adds to a symbol in an operand", self._peek())
        return operand

    def _address(self) -> Address:
        opening = self._expect("[")
        base: str | None = None
        offset = 0
        token = self._peek_or_fail()
        if token.kind is TokenKind.NAME:
            base = self._next().text
        elif token.kind is TokenKind.NUMBER:
            offset = self._integer()
        else:
            raise self._unknown()
        while self._peek_text() in ("+", "-"):
            # `+ -8` is how negative offsets are written.
            sign = 1
            while self._peek_text() in ("+", "-"):
                sign = -sign if self._next().text == "-" else sign
            offset += sign * self._integer()
        extra: list[Operand] = []
        while self._accept(","):
            extra.append(self._operand())
        return Address(base, offset, opening.start, self._expect("]").end, tuple(extra))

    def _immediate(self) -> Immediate:
        first = self._peek_or_fail()
        sign = 1
        while self._peek_text() in ("+", "-"):
            sign = -sign if self._next().text == "-" else sign
        token = self._next()
        if token.kind is not TokenKind.NUMBER:
            raise self._unknown(-1)
        text = token.text.rstrip("U")
        if text[:2] in ("0f", "0F", "0d", "0D"):
            return Immediate(token.text, first.start, token.end, None, int(text[2:], 16))
        if "." in text:
            return Immediate(token.text, first.start, token.end, None)
        value = self._value(text)
        return Immediate(self._source[first.start : token.end], first.start, token.end, sign * value)

    def _integer(self) -> int:
        token = self._next()
        if token.kind is not TokenKind.NUMBER or token.text[:2] in ("0f", "0F", "0d", "0D") or "." in token.text:
            raise self._unknown(-1)
        return self._value(token.text.rstrip("U"))

    @staticmethod
    def _value(text: str) -> int:
        if len(text) > 1 and text[0] == "0" and text[1:].isdigit():
            return int(text, 8)
        return int(text, 0)

    @staticmethod
    def _is_type(word: str) -> bool:
        return word == "pred" or (word[:1] in "bsuf" and word[1:2].isdigit())

    def _width(self, kind: str) -> int:
        if kind == "pred":
            return 1
        digits = "".join(c for c in kind[1:] if c.isdigit())
        if digits not in _WIDTHS:
            raise self._refuse(f"declares something of the type {kind!r}, which is not known")
        return _WIDTHS[digits]

    # --- tokens
    def _peek(self) -> Token | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _peek_or_fail(self) -> Token:
        token = self._peek()
        if token is None:
            raise self._refuse("ends in the middle of a statement")
        return token

    def _peek_text(self) -> str:
        return self._tokens[self._at].text if self._at < len(self._tokens) else ""

    def _peek_kind(self) -> TokenKind | None:
        return self._tokens[self._at].kind if self._at < len(self._tokens) else None

    def _next(self) -> Token:
        token = self._peek_or_fail()
        self._at += 1
        return token

    def _accept(self, text: str) -> bool:
        if self._peek_text() == text:
            self._at += 1
            return True
        return False

    def _expect(self, text: str) -> Token:
        token = self._peek_or_fail()
        if token.text != text:
            raise self._refuse(f"has {token.text!r} where {text!r} is expected", token)
        self._at += 1
        return token

    def _unknown(self, step: int = 0) -> UnsupportedError:
        token = self._tokens[min(self._at + step, len(self._tokens) - 1)]
        return self._refuse(f"has {token.text!r}, which is not known there", token)

    def _refuse(self, what: str, token: Token | None = None) -> UnsupportedError:
        where = f", line {token.line}" if token else ""
        return UnsupportedError(f"Kernel {self._kernel!r}{where}: its PTX {what}.")
