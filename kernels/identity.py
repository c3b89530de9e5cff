"""Identity of a function: a digest that changes when what it compiles to may change, and not otherwise.

It covers the code of the function and of all it reaches inside this package: device functions, PTX instructions, what
makes these, and the constants they close over. Code is its tokens, so that comments, docstrings and layout are no part
of it, and Python 3.11 and 3.12 agree on it. Names of other packages stand for themselves: their versions are kept
beside each cubin (`kernels.cubins`).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import linecache
import tokenize
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

_PACKAGE = __name__.partition(".")[0]
_known: WeakKeyDictionary[FunctionType, str] = WeakKeyDictionary()


def identity(value: Any) -> str:
    """Identity of `value`: a digest for a function of this package, and for what Numba compiles; the name for classes
    and what is of other packages; text for constants.

    Raises TypeError for an object that nothing is known to tell from another of its type.
    """
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, FunctionType) and _is_ours(value):
        return code_identity(value)
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, functools.partial):
        return f"partial({identity([value.func, value.args, value.keywords])})"
    # Behind a Numba dispatcher, an intrinsic, a cached function.
    for attribute in ("py_func", "_defn", "__wrapped__"):
        inner = getattr(value, "__dict__", {}).get(attribute)
        if isinstance(inner, FunctionType):
            return code_identity(inner)
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(map(identity, value))})"
    if isinstance(value, dict):
        return f"dict({', '.join(f'{identity(key)}: {identity(item)}' for key, item in value.items())})"
    if isinstance(value, frozenset | set):
        return f"set({', '.join(sorted(map(identity, value)))})"
    if isinstance(value, enum.Enum):
        return str(value)
    if dataclasses.is_dataclass(value):
        fields = (f"{field.name}={identity(getattr(value, field.name))}" for field in dataclasses.fields(value))
        return f"{type(value).__qualname__}({', '.join(fields)})"
    text = repr(value)
    if " at 0x" in text:
        raise TypeError(f"{text}: a kernel's key cannot tell it from another {type(value).__qualname__}")
    return text


def code_identity(function: FunctionType) -> str:
    """The digest of a function, whatever package it is of."""
    if function not in _known:
        _known[function] = "again"  # where it reaches itself
        _known[function] = hashlib.sha256("\n".join(_lines(function)).encode()).hexdigest()
    return _known[function]


def code_words(file: str) -> list[str]:
    """The tokens of a Python file, without comments, docstrings and layout."""
    return _tokens(file)[1]


def _is_ours(value: FunctionType | ModuleType) -> bool:
    name = value.__name__ if isinstance(value, ModuleType) else value.__module__
    return (name or "").partition(".")[0] == _PACKAGE


def _lines(function: FunctionType) -> Iterable[str]:
    """The function's code, and what each name in it stands for."""
    words = _words(function.__code__)
    yield " ".join(words)
    yield identity(function.__defaults__)
    closed = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    for name in _names(words):
        if name in closed:
            value = closed[name].cell_contents
        elif name in function.__globals__:
            value = function.__globals__[name]
        else:
            continue  # no name, its own, or a builtin
        if not isinstance(value, ModuleType) or not _is_ours(value):
            yield f"{name} = {identity(value)}"
            continue
        for attribute in dict.fromkeys(after for before, after in _attributes(words) if before == name):
            if hasattr(value, attribute):
                yield f"{name}.{attribute} = {identity(getattr(value, attribute))}"


def _names(words: list[str]) -> Iterable[str]:
    """Words that may name something outside: no attributes, no keywords of a call, nothing defined or assigned here."""
    around = zip(["", *words], words, [*words[1:], ""], strict=False)
    return dict.fromkeys(word for before, word, after in around if before not in (".", "def") and after != "=")


def _attributes(words: list[str]) -> Iterable[tuple[str, str]]:
    """Names with what they are asked for, as in `ptx.mbarrier_init`."""
    return ((words[i - 1], words[i + 1]) for i in range(1, len(words) - 1) if words[i] == ".")


def _words(code: CodeType) -> list[str]:
    """The tokens of a function, its decorators first; of one without a file its bytecode, which is its Python's."""
    starts, words, ends = _tokens(code.co_filename)
    if not starts:
        return [_bytecode(code), *code.co_freevars, *(word for name in code.co_names for word in (".", name))]
    begin = bisect_left(starts, code.co_firstlineno)
    # Up to the end of its last statement.
    return words[begin : ends[bisect_right(ends, bisect_left(starts, _last_line(code)))]]


def _last_line(code: CodeType) -> int:
    inner = (value for value in code.co_consts if isinstance(value, CodeType))
    own = (line for _, _, line in code.co_lines() if line is not None)
    return max(*own, *map(_last_line, inner), code.co_firstlineno)


def _bytecode(code: CodeType) -> str:
    constants = [_bytecode(value) if isinstance(value, CodeType) else repr(value) for value in code.co_consts]
    return f"{code.co_code.hex()} {constants} {code.co_names}"


@functools.cache
def _tokens(file: str) -> tuple[list[int], list[str], list[int]]:
    """A file's tokens without comments and docstrings: the line of each, its text, and the places behind statements."""
    lines = linecache.getlines(file)
    starts: list[int] = []
    words: list[str] = []
    ends: list[int] = []
    formatted: tuple[int, int] | None = None  # where an f-string began, which Python 3.12 takes apart
    nested = 0
    for token in tokenize.generate_tokens(iter(lines).__next__) if lines else ():
        name = tokenize.tok_name[token.type]
        if name == "FSTRING_START":
            formatted, nested = formatted or token.start, nested + 1
        elif name == "FSTRING_END":
            nested -= 1
        if formatted is not None and (name != "FSTRING_END" or nested):
            continue
        if token.type in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            continue
        line, text = token.start[0], {tokenize.INDENT: "{", tokenize.DEDENT: "}"}.get(token.type, token.string)
        if formatted is not None:
            line, text, formatted = formatted[0], _between(lines, formatted, token.end), None
        if token.type == tokenize.NEWLINE:
            text = ";"
            # A string that is a statement says nothing to the compiler.
            if words and words[-1][-1:] in "\"'" and (len(words) < 2 or words[-2] in "{};"):
                starts.pop()
                words.pop()
                line, text = token.start[0], "pass ;"
        starts.append(line)
        words.append(text)
        if token.type == tokenize.NEWLINE:
            ends.append(len(words))
    return starts, words, ends


def _between(lines: list[str], begin: tuple[int, int], end: tuple[int, int]) -> str:
    if begin[0] == end[0]:
        return lines[begin[0] - 1][begin[1] : end[1]]
    whole = lines[begin[0] - 1 : end[0]]
    return "".join([whole[0][begin[1] :], *whole[1:-1], whole[-1][: end[1]]])
