"""What the text of kernels must hold, as it is seen neither under the simulator nor by the compiler."""

import ast
from pathlib import Path

import pytest

from kernels import catalogue

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
SOURCES = sorted(
    path for path in KERNELS.rglob("*.py") if "device_function" in path.read_text() or "Kernel(" in path.read_text()
)


def named(node, *names):
    """Whether it is one of these names, or an attribute or a call of one."""
    node = node.func if isinstance(node, ast.Call) else node
    return (node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)) in names


def kernels_of(tree):
    """Functions that the compiler takes: device functions, and what a factory hands to Kernel."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            if any(named(decorator, "device_function") for decorator in node.decorator_list):
                yield node
            handed = {
                call.args[1].id
                for call in ast.walk(node)
                if isinstance(call, ast.Call) and named(call, "Kernel") and isinstance(call.args[1], ast.Name)
            }
            yield from (inner for inner in node.body if isinstance(inner, ast.FunctionDef) and inner.name in handed)


def wide(node):
    """Places where a Python float takes part in arithmetic: a GPU computes that, and all it touches, in float64."""
    if isinstance(node, ast.Call) and named(node, "float32", "float64"):
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield node.lineno, f"{node.value} outside float32()"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        yield node.lineno, "/ of integers, or not rounded as div.rn"
    for child in ast.iter_child_nodes(node):
        yield from wide(child)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(KERNELS)))
def test_no_arithmetic_in_float64_unsaid(path):
    found = [place for kernel in kernels_of(ast.parse(path.read_text())) for place in wide(kernel)]
    assert not found, found


def test_every_factory_is_in_the_catalogue():
    """What is not there is compiled by no test."""
    listed = {kernel.recipe[:2] for kernel in catalogue() if kernel.recipe}
    for path in SOURCES:
        module = ".".join(path.relative_to(KERNELS.parent).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(named(each, "kernel_factory") for each in node.decorator_list):
                assert (module, node.name) in listed, f"{module}.{node.name} is not in kernels.catalogue()"


def test_the_checks_find_what_they_are_for():
    source = """
@device_function
def f(x):
    return x * 0.5 + float32(0.5) * float32(-math.inf) + x / 2
@kernel_factory
def factory():
    def kernel(x):
        x[0] = 1.0
    return Kernel("name", kernel, (), 32)
"""
    found = [place for kernel in kernels_of(ast.parse(source)) for place in wide(kernel)]
    assert found == [
        (4, "0.5 outside float32()"),
        (4, "/ of integers, or not rounded as div.rn"),
        (8, "1.0 outside float32()"),
    ]
