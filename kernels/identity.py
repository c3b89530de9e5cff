"""Identity of a function: a digest that changes when what it compiles to may change, and not otherwise.

It covers the code of the function and of all it reaches inside this package: device functions, PTX instructions, what
makes these, and the constants they close over. Code is the syntax tree written out again, so that comments, docstrings
and layout are no part of it, and Python 3.11 and 3.12 agree on it. Names of other packages stand for themselves: their
versions are kept beside each cubin (`kernels.launch`).
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import hashlib
import sys
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

_PACKAGE = __name__.partition(".")[0]
_known: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def identity(value: Any) -> str:
    """What tells `value` apart: a digest for a function or a class of this package, and for what Numba compiles; the
    name for those of other packages; text for constants.

    Raises TypeError for an object that nothing is known to tell from another of its type.
    """
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, type | FunctionType) and _is_ours(value):
        return code_identity(value)
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
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
        return f"{identity(type(value))}({', '.join(fields)})"
    text = repr(value)
    if " at 0x" in text:
        raise TypeError(f"{text}: a kernel's key cannot tell it from another {type(value).__qualname__}")
    return text


def code_identity(owner: type | FunctionType) -> str:
    """The digest of a function or a class, whatever package it is of."""
    if owner not in _known:
        _known[owner] = "again"  # where it reaches itself
        _known[owner] = hashlib.sha256(_text(owner).encode()).hexdigest()
    return _known[owner]


def _is_ours(owner: Any) -> bool:
    name = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__
    return (name or "").partition(".")[0] == _PACKAGE


def _text(owner: type | FunctionType) -> str:
    """Code of a function or a class, and what each name in it stands for."""
    if isinstance(owner, type):
        return _syntax(owner.__module__).classes[owner.__qualname__]
    written = _written(owner)
    closed = dict(zip(owner.__code__.co_freevars, owner.__closure__ or (), strict=True))
    lines = [written.text, identity(owner.__defaults__)]
    for name, attributes in written.names.items():
        if name in closed:
            value = closed[name].cell_contents
        elif name in owner.__globals__:
            value = owner.__globals__[name]
        else:
            continue  # its own, or a builtin
        if isinstance(value, ModuleType) and _is_ours(value):
            found = [attribute for attribute in attributes if hasattr(value, attribute)]
            lines += [f"{name}.{attribute} = {identity(getattr(value, attribute))}" for attribute in found]
        else:
            lines.append(f"{name} = {identity(value)}")
    return "\n".join(lines)


def _written(function: FunctionType) -> _Function:
    """What the function's file says; of one without a file its bytecode, which depends on Python's version too."""
    module, code = sys.modules.get(function.__module__), function.__code__
    if module is not None and getattr(module, "__file__", None) == code.co_filename:
        return _syntax(function.__module__).functions[code.co_firstlineno]
    return _Function(_bytecode(code), {name: list(code.co_names) for name in (*code.co_names, *code.co_freevars)})


def _bytecode(code: CodeType) -> str:
    constants = [_bytecode(value) if isinstance(value, CodeType) else repr(value) for value in code.co_consts]
    return f"{code.co_code.hex()} {constants} {code.co_names}"


@dataclasses.dataclass(frozen=True)
class _Function:
    """What is written of a function. names: each with the attributes it is asked for, as in `ptx.mbarrier_init`."""

    text: str
    names: dict[str, list[str]]


@dataclasses.dataclass(frozen=True)
class _Syntax:
    """What a file defines. functions: by first line, that of the decorators, as their code objects have it."""

    functions: dict[int, _Function]
    classes: dict[str, str]


@functools.cache
def _syntax(module: str) -> _Syntax:
    file = sys.modules[module].__file__
    assert file is not None
    tree = ast.parse(Path(file).read_bytes())
    nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
            node.body[0] = ast.Pass()
    functions: dict[int, _Function] = {}
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            decorators = [decorator.lineno for decorator in getattr(node, "decorator_list", [])]
            line = min([node.lineno, *decorators])
            # Of two lambdas in a line each counts as both.
            before = functions.get(line, _Function("", {}))
            functions[line] = _Function(before.text + ast.unparse(node), before.names | _names(node))
    classes = {node.name: ast.unparse(node) for node in nodes if isinstance(node, ast.ClassDef)}
    return _Syntax(functions, classes)


def _names(node: ast.AST) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            names.setdefault(inner.id, [])
        elif isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
            attributes = names.setdefault(inner.value.id, [])
            if inner.attr not in attributes:
                attributes.append(inner.attr)
    return names
