"""A generated tree is written once, and never over anything else."""

from __future__ import annotations

import json

import pytest

from spatial_mamba_d2.data.sample_tree import create_tree

FILE = "parameters.json"


def create(root, parameters, write=None):
    def write_parameters(tree):
        (tree / FILE).write_text(json.dumps(parameters))

    create_tree(
        root,
        parameters,
        write=write or write_parameters,
        read_parameters=lambda tree: [json.loads((tree / FILE).read_text())],
    )


def test_it_is_written_once(tmp_path):
    create(tmp_path / "new/data", {"seed": 1})
    create(tmp_path / "new/data", {"seed": 1}, write=lambda tree: pytest.fail("written again"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["data"]


def test_other_parameters_are_refused(tmp_path):
    create(tmp_path / "data", {"seed": 1})
    with pytest.raises(ValueError, match=r"made with \{'seed': 2\}; .*data holds \{'seed': 1\}\."):
        create(tmp_path / "data", {"seed": 2})


@pytest.mark.parametrize("content", ["[]", "null", "{", '{"seed": 1, "version": 2}'])
def test_other_content_is_refused(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match="root must be absent, empty, or hold sample data"):
        create(tmp_path, {"seed": 1})
    assert (tmp_path / FILE).read_text() == content


def test_another_process_with_the_same_parameters_may_be_faster(tmp_path):
    create(
        tmp_path / "data", {"seed": 1}, write=lambda tree: create(tmp_path / "data", {"seed": 1})
    )
    assert json.loads((tmp_path / "data" / FILE).read_text()) == {"seed": 1}


def test_another_process_with_other_parameters_is_an_error(tmp_path):
    def overtaken(tree):
        create(tmp_path / "data", {"seed": 2})

    with pytest.raises(ValueError, match=r"data holds \{'seed': 2\}"):
        create(tmp_path / "data", {"seed": 1}, write=overtaken)
    assert json.loads((tmp_path / "data" / FILE).read_text()) == {"seed": 2}
