"""Arguments of the command lines: options, then KEY VALUE."""

from __future__ import annotations

from pathlib import Path

import pytest

from spatial_mamba_d2.system.cli import build_training_parser, build_visualization_parser


def test_keys_after_an_option_of_several_words(tmp_path, monkeypatch):
    parser = build_visualization_parser(None)
    words = ["--output", "o", "--input", "a.jpg", "b", "MODEL.WEIGHTS", "w.pth", "SEED", "1"]
    options = parser.parse_args(words)
    assert options.input == [Path("a.jpg"), Path("b")]
    assert options.opts == ["MODEL.WEIGHTS", "w.pth", "SEED", "1"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SCAN.PNG").touch()  # a file, although it looks like a key
    assert parser.parse_args(["--output", "o", "--input", "SCAN.PNG"]).opts == []


@pytest.mark.parametrize(
    "words",
    [
        ["SOLVER.MAX_ITER", "1", "--num-gpus", "2"],
        ["SOLVER.MAX_ITER", "1", "--resume"],
        ["SOLVER.MAX_ITER", "--resume"],
    ],
)
def test_options_after_keys_are_refused(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        build_training_parser(None).parse_args(words)
    option = next(word for word in words if word.startswith("--"))
    assert f"options go before KEY VALUE, got {option} after SOLVER.MAX_ITER" in (
        capsys.readouterr().err
    )


def test_negative_values_are_values():
    words = ["TEST.EVAL_PERIOD", "-1", "SOLVER.BASE_LR", "-1e-3"]
    assert build_training_parser(None).parse_args(["--resume", *words]).opts == words


def test_no_input_before_the_keys(capsys):
    with pytest.raises(SystemExit, match="2"):
        build_visualization_parser(None).parse_args(
            ["--output", "o", "--input", "MODEL.WEIGHTS", "w.pth"]
        )
    assert "argument --input: expected words before KEY VALUE" in capsys.readouterr().err
