"""A working directory of its own for each test that runs a stage."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows say that nothing else ran: other tests do, beside this one."""
    from stages import metrics

    monkeypatch.setattr(metrics, "OtherLoad", lambda: SimpleNamespace(share=lambda: 0.0))


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout with the repository's conf/ and params.yaml as working directory; nothing runs under DVC."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    shutil.copytree(ROOT / "conf", folder / "conf")
    shutil.copy(ROOT / "params.yaml", folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.setenv("AFS_CACHE", str(tmp_path / "cache"))
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU, tests that need one are skipped, so that a plain `pytest` passes everywhere."""
    from stages.host import gpu_available

    if not gpu_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
