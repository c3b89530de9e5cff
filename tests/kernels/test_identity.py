"""Which edits of the kernels' sources make which cubins anew: a copy of kernels/ is edited and asked for its keys."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from kernel_numerics import ROOT

# Each folder's kernels/ in turn, in one process: it is Numba and torch that take long to import.
KEYS = """
import json, sys
found = []
for folder in sys.argv[1:]:
    for name in [name for name in sys.modules if name.partition(".")[0] == "kernels"]:
        del sys.modules[name]
    sys.path[0] = folder
    from kernels import catalogue
    found.append({kernel.name: kernel.entry(kernel.architectures[0]) for kernel in catalogue(("bf16",))})
print(json.dumps(found))
"""

EDITS = {
    "a comment": ("device.py", "\ndef silu", "\n# A comment.\ndef silu"),
    "a docstring": ("linear/tiled/mma.py", '"""Operands of a step of 16 columns to registers."""', '"""Operands."""'),
    "another kernel's file": ("residual.py", "THREADS", "OTHER_THREADS"),
    "a callee": ("linear/tiled/mma.py", "a_place = uint32(((step * 2 + a_chunk) ^ swizzle) * 16)",
                 "a_place = uint32(((2 * step + a_chunk) ^ swizzle) * 16)"),
    "a constant": ("linear/tiled/tiling.py", "PITCH = 2 * 8 * PIECE + 16", "PITCH = 2 * 8 * PIECE + 32"),
    "an instruction": ("ptx.py", '"ex2.approx.ftz.f32 $0, $1;"', '"ex2.approx.f32 $0, $1;"'),
    "an instruction's twin": ("ptx.py", "return np.float32(1.0) / a", "return np.float32(1) / a"),
    "how device functions are compiled": ("cuda.py", "forceinline=True", "forceinline=False"),
    "the launcher": ("linear/tiled/__init__.py", "count, (rows, depth) = len(x), shape_of(weight)",
                     "(rows, depth), count = shape_of(weight), len(x)"),
}  # fmt: skip


def keys(folders):
    """The names and keys that each folder's kernels/ has."""
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    command = [sys.executable, "-c", KEYS, *map(str, folders)]
    done = subprocess.run(command, cwd=folders[0], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


pytestmark = pytest.mark.xdist_group("identity")


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """Names of the kernels whose key an edit changes, by edit; and all names."""
    folders = []
    for file, old, new in EDITS.values():
        folder = tmp_path_factory.mktemp("edited")
        shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
        path = folder / "kernels" / file
        text = path.read_text()
        assert old in text, f"{file} has no {old!r} to edit"
        path.write_text(text.replace(old, new))
        folders.append(folder)
    before, *after = keys([ROOT, *folders])
    assert all(each.keys() == before.keys() for each in after)
    found = {
        edit: {name for name in before if before[name] != each[name]} for edit, each in zip(EDITS, after, strict=True)
    }
    return found, set(before)


def test_text_that_is_no_code_changes_nothing(changed):
    found, _ = changed
    for edit in ("a comment", "a docstring", "an instruction's twin", "the launcher"):
        assert found[edit] == set(), edit


def test_an_edit_reaches_what_uses_it(changed):
    found, every = changed
    assert found["another kernel's file"] == {"residual_naive_bf16"}
    portable = {name for name in every if "tiled_mma" in name}
    assert portable and found["a callee"] == portable
    assert found["a constant"] == {name for name in every if "tiled" in name}
    exponents = found["an instruction"]
    assert {name for name in every if "attention_flash" in name or "prefill" in name} <= exponents
    assert not {name for name in exponents if name.startswith(("embedding", "residual", "argmax"))}


def test_the_compiler_is_part_of_the_key_of_what_has_callees(changed):
    found, every = changed
    without = every - found["how device functions are compiled"]
    assert without == {"advance_i32", "embedding_naive_bf16", "embedding_vectors_bf16", "kv_write_naive_bf16"}
