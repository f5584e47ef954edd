"""Something to do as soon as another module is imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest

from spatial_mamba_d2.system.after_import import after_import


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that nobody has imported."""
    (tmp_path / "module_for_a_test.py").write_text("loaded = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    yield "module_for_a_test"
    sys.modules.pop("module_for_a_test", None)


def test_it_is_done_once_and_after_the_module_is_complete(module):
    seen = []
    after_import(module, lambda: seen.append(sys.modules[module].loaded))
    assert importlib.util.find_spec(module) is not None and seen == []
    importlib.import_module(module)
    assert seen == [True]
    importlib.reload(sys.modules[module])
    assert seen == [True]
    after_import(module, lambda: seen.append("at once"))
    assert seen == [True, "at once"]


def test_a_module_that_is_not_there_stays_missing(module):
    after_import("no_such_module_anywhere", lambda: pytest.fail("called"))
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        importlib.import_module("no_such_module_anywhere")
