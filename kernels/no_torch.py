"""Stand-in for torch where kernels are only compiled: a name for everything that a module may ask it for."""

from __future__ import annotations

from typing import Any


class _Named:
    """A name of torch's, as a key of a table or in an annotation: not to be used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _named(f"{self._name}.{name}")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{self._name}: torch is not imported where kernels are compiled")

    def __repr__(self) -> str:
        return self._name


_names: dict[str, _Named] = {}


def _named(name: str) -> _Named:
    return _names.setdefault(name, _Named(name))


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _named(f"torch.{name}")
