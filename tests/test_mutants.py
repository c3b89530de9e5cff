"""Whether each mutant fits the code and its tests are there; that these notice it, `make mutants` says."""

import re

import pytest
from mutants import ROOT, read


@pytest.mark.parametrize("mutant", read(), ids=str)
def test_a_mutant_fits(mutant):
    compile(mutant.text(ROOT), mutant.file, "exec")
    file, *expression = mutant.arguments
    names = re.findall(r"^(?:def|class) (\w+)", (ROOT / file).read_text(), re.MULTILINE)
    assert not expression or any(expression[1] in name for name in names), f"{file} has no test {expression[1]}"
