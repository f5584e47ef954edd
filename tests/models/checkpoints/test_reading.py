"""Reading of checkpoint files: what real ones hold, what broken and malicious ones do."""

from __future__ import annotations

import argparse
import collections
import datetime
import hashlib
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from spatial_mamba_d2.models import build_classifier, load_weights, read_checkpoint
from spatial_mamba_d2.models.checkpoints.names import to_official
from spatial_mamba_d2.models.checkpoints.reading import OpaqueObject, WeightsError, unwrap

FORMATS = {"zip": True, "legacy": False}  # since PyTorch 1.6, and before


@pytest.fixture(params=FORMATS)
def save(request, tmp_path):
    """``save(content)``: the path of a checkpoint, in each of PyTorch's two formats."""

    def write(content):
        path = tmp_path / f"{request.param}.pth"
        zipped = FORMATS[request.param]
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        return path

    return write


@pytest.fixture
def foreign(monkeypatch):
    """``foreign(module, class, bases)``: a class that is gone when the test reads the file."""
    names = []

    def make(module, name, *bases, **attributes):
        parts = module.split(".")
        for i in range(len(parts)):
            package = ".".join(parts[: i + 1])
            if package not in names:
                names.append(package)
                monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        made = type(name, bases, {"__module__": module, "__qualname__": name, **attributes})
        setattr(sys.modules[module], name, made)
        return made

    make.forget = lambda: [monkeypatch.setitem(sys.modules, name, None) for name in names]
    return make


def test_both_formats_hold_the_same(save):
    path = save({"state_dict": {"a": torch.arange(3)}, "n": 1, "t": (True, None, 2.5, b"x")})
    content = read_checkpoint(path)
    assert torch.equal(content["state_dict"]["a"], torch.arange(3))
    assert (content["n"], content["t"]) == (1, (True, None, 2.5, b"x"))


OBJECTS = {
    "numpy float": lambda: np.float64(83.5),
    "numpy integer": lambda: np.int64(3),
    "numpy bool": lambda: np.bool_(True),
    "numpy array": lambda: np.arange(3),
    "random state": np.random.get_state,
    "Namespace": lambda: argparse.Namespace(lr=1.0, output=pathlib.PurePosixPath("a/b")),
    "datetime": lambda: datetime.datetime(2025, 1, 2),
    "timedelta": lambda: datetime.timedelta(seconds=1),
    "path": lambda: pathlib.Path("a"),
    "defaultdict": lambda: collections.defaultdict(list, a=[1]),
    "frozenset": lambda: frozenset({1}),
}


@pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)
def test_common_objects_are_no_obstacle(make, save):
    path = save({"model": {"a": torch.ones(2)}, "x": make()})
    assert torch.equal(read_checkpoint(path)["model"]["a"], torch.ones(2))


def test_yacs_and_fvcore_nodes(save, foreign):
    yacs = foreign("yacs.config", "CfgNode", dict)
    fvcore = foreign("fvcore.common.config", "CfgNode", yacs)
    node = yacs(A=yacs(B=(1, "x")))
    node.__dict__["__immutable__"] = True
    path = save({"model": {"a": torch.ones(2)}, "yacs": node, "fvcore": fvcore(C=1)})
    foreign.forget()
    content = read_checkpoint(path)
    assert content["yacs"] == {"A": {"B": (1, "x")}} and content["fvcore"] == {"C": 1}
    assert type(content["yacs"]) is collections.OrderedDict


def test_mmengine_configuration_and_history(save, foreign):
    """As ``mmengine.runner`` writes them; a method pickles as a call of ``getattr``."""
    config_dict = foreign(
        "mmengine.config.config",
        "ConfigDict",
        dict,
        __reduce_ex__=lambda self, _: (type(self), (dict(self),), None, None, None),
    )

    def mean(self):
        pass

    mean.__module__, mean.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer.mean"
    buffer = foreign("mmengine.logging.history_buffer", "HistoryBuffer", mean=mean)
    history = buffer()
    history._log_history = np.ones(3)
    history._statistics_methods = collections.OrderedDict(mean=buffer.mean)
    hub = {"log_scalars": {"train/loss": history}, "runtime_info": {"iter": 5}}
    path = save(
        {
            "state_dict": {"a": torch.ones(2)},
            "meta": {"cfg": config_dict(model=config_dict(type="MaskRCNN"))},
            "message_hub": hub,
        }
    )
    foreign.forget()
    content = read_checkpoint(path)
    assert content["meta"]["cfg"] == {"model": {"type": "MaskRCNN"}}
    assert content["message_hub"]["runtime_info"] == {"iter": 5}
    assert type(content["message_hub"]["log_scalars"]["train/loss"]) is OpaqueObject


def test_omegaconf(save, foreign):
    node = foreign("omegaconf.nodes", "AnyNode")
    metadata = foreign("omegaconf.base", "ContainerMetadata")
    config = foreign("omegaconf.dictconfig", "DictConfig")
    leaf, root, about = node(), config(), metadata()
    leaf._val, about.object_type, about.flags = 3, dict, {}
    root.__dict__.update(_content={"a": leaf}, _metadata=about, _parent=None)
    path = save({"state_dict": {"a": torch.ones(2)}, "cfg": root})
    foreign.forget()
    assert type(read_checkpoint(path)["cfg"]) is OpaqueObject


def test_weights_load_from_among_foreign_objects(save, foreign):
    narrow = {"embed_dim": 16, "depths": (1, 1, 1, 1)}
    model = build_classifier("tiny", num_classes=7, **narrow)
    state = {to_official(name): value for name, value in model.state_dict().items()}
    node = foreign("yacs.config", "CfgNode", dict)
    path = save({"model": state, "config": node(A=1), "max_accuracy": np.float64(83.5)})
    foreign.forget()
    other = build_classifier("tiny", num_classes=7, **narrow)
    assert not load_weights(other, path).new
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def malicious(marker):
    command = f"touch {marker}"
    source = f"open({str(marker)!r}, 'w')"
    return {
        "os.system": (Call(os.system, command), r"(posix|nt)\.system"),
        "eval": (Call(eval, source), r"builtins\.eval"),
        "exec": (Call(exec, source), r"builtins\.exec"),
        "subprocess": (Call(subprocess.Popen, ["touch", str(marker)]), r"subprocess\.Popen"),
        "import": (Call(__import__, "os"), r"builtins\.__import__"),
    }


@pytest.mark.parametrize("attack", malicious(""))
def test_code_is_refused(attack, save, tmp_path):
    marker = tmp_path / "executed"
    call, named = malicious(marker)[attack]
    path = save({"model": {"a": torch.ones(2)}, "x": call})
    with pytest.raises(WeightsError, match=rf"refers to {named}, which is not data; refused"):
        read_checkpoint(path)
    assert not marker.exists()


def test_code_behind_an_allowed_class_is_refused(save, foreign, tmp_path):
    marker = tmp_path / "executed"
    node = foreign(
        "yacs.config", "CfgNode", dict, __reduce__=lambda _: (os.system, (f"touch {marker}",))
    )
    path = save({"model": {"a": torch.ones(2)}, "config": node()})
    with pytest.raises(WeightsError, match=r"refers to (posix|nt)\.system"):
        read_checkpoint(path)
    assert not marker.exists()


def test_functions_of_allowed_packages_are_not_called(save, foreign, tmp_path):
    """Nor is ``getattr``, which would lead from an allowed class to others."""
    marker = tmp_path / "executed"
    save_text = Call(np.savetxt, str(marker), [1.0])
    method = Call(getattr, np.ndarray, "tofile")
    path = save({"model": {"a": torch.ones(2)}, "x": save_text, "y": method})
    content = read_checkpoint(path)
    assert type(content["x"]) is type(content["y"]) is OpaqueObject
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_raw_pickles_are_refused(protocol, tmp_path):
    """Detectron2 unpickles such files; nothing here does."""
    marker, path = tmp_path / "executed", tmp_path / "model_final.pkl"
    content = {"model": {"a": np.ones(2)}, "x": Call(os.system, f"touch {marker}")}
    path.write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(WeightsError, match="model_final.pkl is a raw pickle, as in Detectron2's"):
        read_checkpoint(path)
    assert not marker.exists()


def test_newer_protocols_are_named(tmp_path):
    path = tmp_path / "protocol4.pth"
    torch.save({"a": torch.ones(2), "x": Call(os.system, "true")}, path, pickle_protocol=4)
    with pytest.raises(WeightsError, match=r"protocol4.pth is pickled with protocol 4"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # new versions of PyTorch are about to drop it
def test_scripts_are_refused(tmp_path):
    path = tmp_path / "script.pth"
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    with pytest.raises(WeightsError, match=r"script.pth"):
        read_checkpoint(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nowhere.pth"):
        read_checkpoint(tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.pth", b"", "is empty"),
        ("page.pth", b"\n<!DOCTYPE html><html>404</html>", "is a web page"),
        ("page.safetensors", b"<html>Google Drive - Quota exceeded</html>", "is a web page"),
        ("pointer.pth", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("text.pth", b"hello world, this is no checkpoint", "is truncated or not"),
        ("cut.safetensors", b"\x10\0\0\0", "is truncated or not"),
    ],
)
def test_files_that_are_no_checkpoints_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=f"{name}.*{message}"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_truncated_files_are_named(share, save):
    path = save({f"layer{i}": torch.rand(100) for i in range(20)})
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match=rf"{path.name} \(\d+ bytes\) is truncated or not"):
        read_checkpoint(path)


def test_a_list_is_no_checkpoint(save):
    with pytest.raises(WeightsError, match="must hold a dictionary, got list"):
        read_checkpoint(save([torch.ones(2)]))


def test_sha256(save):
    path = save({"a": torch.ones(2)})
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert "a" in read_checkpoint(path, right) and "a" in read_checkpoint(path, right.upper())
    wrong = "0" * 64
    with pytest.raises(WeightsError, match=f"its SHA-256 is {right}, must be {wrong}"):
        read_checkpoint(path, wrong)
    with pytest.raises(ValueError, match="sha256 must be 64 hexadecimal digits, got '0123abcd'"):
        read_checkpoint(path, "0123abcd")


def test_a_hash_in_the_name_is_only_a_name(save):
    path = save({"a": torch.ones(2)})
    renamed = path.rename(path.with_name("spatialmamba-0123abcd.pth"))
    assert "a" in read_checkpoint(renamed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_ema"])
def test_weights_that_are_not_finite_are_refused(wrapper, value, save):
    state = {"a": torch.ones(3), "bn.running_var": torch.tensor([1.0, value]), "n": torch.tensor(1)}
    path = save(state if wrapper is None else {wrapper: state, "epoch": value})
    with pytest.raises(WeightsError, match=rf"{path.name} .*not finite.* 1 of 3 .*bn\.running_var"):
        unwrap(read_checkpoint(path), str(path))


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"a": torch.ones(3)}, "best_model_score": torch.tensor(-torch.inf)},
        {"model": {"a": torch.ones(3)}, "loss": torch.tensor(torch.nan), "min": float("nan")},
        {"model": {"a": torch.ones(3)}, "model_ema": {"a": torch.full((3,), torch.inf)}},
        {"model": {"state_dict": {"a": torch.ones(3)}, "score": torch.tensor(torch.nan)}},
    ],
)
def test_only_the_weights_have_to_be_finite(content, save):
    assert torch.equal(unwrap(read_checkpoint(save(content)))["a"], torch.ones(3))


def test_doubly_wrapped_and_complex_weights_are_looked_into():
    with pytest.raises(WeightsError, match="not finite.* 1 of 1"):
        unwrap({"model": {"state_dict": {"a": torch.tensor([1, complex(0, torch.nan)])}}})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float64])
def test_other_types_are_looked_into(dtype, tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(3).to(dtype)}, path)
    unwrap(read_checkpoint(path))
    torch.save({"a": torch.tensor([1, float("nan")]).to(dtype)}, path)
    with pytest.raises(WeightsError, match="not finite"):
        unwrap(read_checkpoint(path))


def test_weights_that_are_not_finite_leave_the_model_unchanged(test_variant, tmp_path):
    from safetensors.torch import save_file

    model = build_classifier(test_variant, num_classes=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in before.items()}
    next(iter(state.values())).view(-1)[0] = float("nan")
    save_file(state, tmp_path / "a.safetensors")
    for source in (state, tmp_path / "a.safetensors"):
        with pytest.raises(WeightsError, match="not finite"):
            load_weights(model, source)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def zip_again(path, compression=zipfile.ZIP_STORED, **entries):
    """Rewrite a checkpoint's archive with another compression and other or further entries."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    stem = next(iter(contents)).split("/")[0]
    contents.update({f"{stem}/{name}": content for name, content in entries.items()})
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def test_a_file_that_unpacks_to_many_times_its_size_is_refused(tmp_path):
    torch.save({"model": {"a": torch.zeros(30 << 20)}}, tmp_path / "a.pth")
    path = zip_again(tmp_path / "a.pth", zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(WeightsError, match=r"a\.pth \(\d+ bytes\) would unpack to 1258\d+ bytes"):
        read_checkpoint(path)


def test_a_compressed_checkpoint_of_usual_size_is_read(tmp_path):
    weights = torch.rand(1000)
    torch.save({"a": weights}, tmp_path / "a.pth")
    content = read_checkpoint(zip_again(tmp_path / "a.pth", zipfile.ZIP_DEFLATED))
    assert torch.equal(content["a"], weights)


def test_a_tensor_that_repeats_a_number_is_refused(save):
    path = save({"a": torch.ones(1).expand(1 << 20, 1 << 20)})
    with pytest.raises(WeightsError, match="holds a, 4398046511104 bytes that repeat 4; refused"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        },
    ],
)
def test_safetensors_with_a_header_that_lies(header, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(WeightsError, match=r"a\.safetensors"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_safetensors_with_a_header_of_any_length(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(WeightsError, match=r"a\.safetensors"):
        read_checkpoint(tmp_path / "a.safetensors")
