"""Files that are complete or absent, and errors that say what is missing."""

from __future__ import annotations

import errno

import pytest
import torch

from spatial_mamba_d2.models import read_checkpoint
from spatial_mamba_d2.models.checkpoints.writing import write_checkpoint
from spatial_mamba_d2.system.atomic import naming, replacing


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_named(number, tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_text("earlier")
    message = (
        r"last.ckpt cannot be written: .*needs at least 9,000 bytes, [\d,]+ bytes are free in "
    )
    with pytest.raises(OSError, match=message + ".*earlier file is unchanged") as raised:
        with replacing(path, num_bytes=9000) as temporary:
            temporary.write_text("half of it")
            raise RuntimeError("[enforce fail at inline_container.cc:672]") from OSError(
                number, "x"
            )
    assert raised.value.errno == number
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert path.read_text() == "earlier"


def test_other_errors_stay_as_they_are(tmp_path):
    with (
        pytest.raises(RuntimeError, match="of the content"),
        replacing(tmp_path / "a") as temporary,
    ):
        temporary.write_text("half of it")
        raise RuntimeError("of the content")
    assert not list(tmp_path.iterdir())


def test_a_limit_on_the_size_of_files_is_named(tmp_path):
    """With torch.save, whose own error names no reason."""
    resource = pytest.importorskip("resource", reason="limits are POSIX")
    path = tmp_path / "model.pth"
    write_checkpoint({"a": torch.zeros(10)}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(OSError, match="model.pth cannot be written: File too large") as raised:
            write_checkpoint({"a": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "needs at least 4,000,000 bytes" in str(raised.value)
    assert "a file may have 500,000 bytes (ulimit -f)" in str(raised.value)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]
    assert torch.equal(read_checkpoint(path)["a"], torch.zeros(10))


def test_an_open_file_is_named(tmp_path):
    with pytest.raises(OSError, match="metrics.json cannot be written: No space left"):
        with naming(tmp_path / "metrics.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
