"""Exported nets: what others make of them, and what is refused."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import alexnet

from horovod_owt.errors import ConfigError, RunError
from horovod_owt.inference import export as module
from horovod_owt.inference.export import TOLERANCE, check_export, export
from horovod_owt.inference.weights import ModelInfo, TrainedModel, read_trained_model
from horovod_owt.model import alexnet_owt, build_model

CPU = torch.device("cpu")


def net(tmp_path, *, model="alexnet-owt", side=64) -> TrainedModel:
    info = ModelInfo(tmp_path / "run", model, 3, class_names=("cat", "dog", "eel"), image_size=side)
    return TrainedModel(info, build_model(model, 3, seed=1).state_dict())


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(alexnet_owt, "HIDDEN", 7)


def test_torchvision_loads_the_pth(tmp_path):
    ours, file = net(tmp_path), tmp_path / "net.pth"
    assert export(ours, file)["bytes"] == file.stat().st_size
    theirs = alexnet(num_classes=3).eval()
    theirs.load_state_dict(torch.load(file, weights_only=True))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours.build(CPU)(images))
    assert read_trained_model(file).info.classes == 3


def test_safetensors_keep_names_and_image_size(tmp_path, narrow):
    file = tmp_path / "net.safetensors"
    export(net(tmp_path, model="alexnet-owt-bn"), file)
    found = read_trained_model(file)
    assert (found.info.class_names, found.info.image_size) == (("cat", "dog", "eel"), 64)
    assert load_file(file).keys() == net(tmp_path, model="alexnet-owt-bn").weights.keys()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_onnx_runtime_gives_the_same_logits(tmp_path, narrow):
    """At an image size whose features are pooled up to 6 x 6, the harder case, and for any batch."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    ours, file = net(tmp_path, model="alexnet-owt-bn"), tmp_path / "net.onnx"
    for tensor in ours.weights.values():  # a net that has seen batches: running statistics matter
        if tensor.is_floating_point():
            tensor += 0.01 * torch.rand(tensor.shape)
    found = export(ours, file)
    assert found["onnxruntime_difference"] <= TOLERANCE and found["batches_checked"] == [1, 2, 5]
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    model = ours.build(CPU)
    for batch in (1, 3, 8):
        images = torch.randn(batch, 3, 64, 64)
        with torch.no_grad():
            wanted = model(images)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=1e-4, atol=1e-5)
    about = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert about["classes"] == '["cat", "dog", "eel"]' and about["image_size"] == "64"
    assert about["mean"].startswith("[0.485")
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_onnx_runtime_keeps_no_usage_data(tmp_path, narrow):
    """It looks when it is loaded, so in a process that has not loaded it."""
    for name in ("onnxruntime", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(name)
    export(net(tmp_path), tmp_path / "net.safetensors")
    code = (
        "from pathlib import Path; from horovod_owt.inference.export import export;"
        "from horovod_owt.inference.weights import read_trained_model;"
        "from horovod_owt.model import alexnet_owt;"
        "alexnet_owt.HIDDEN = 7; export(read_trained_model(Path('net.safetensors')), Path('net.onnx'))"
    )
    env = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    env |= dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(tmp_path))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    assert (tmp_path / "net.onnx").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name in (".ses", "Microsoft")]


def test_a_file_that_onnx_runtime_reads_otherwise_is_not_written(tmp_path, narrow, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(module, "_onnx_difference", lambda *_: float("nan"))
    monkeypatch.setattr(torch.onnx, "export", lambda model, args, path, **_: path.write_bytes(b""))
    (tmp_path / "net.onnx").write_text("old")
    with pytest.raises(RunError, match="logits differ by nan; wanted 1e-04 or less"):
        export(net(tmp_path), tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(torch, "__version__", "2.14.1")  # not k80's, which is too old
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(ConfigError, match=rf"ONNX without .*{missing}.*pip install 'horovod_owt\[export\]'"):
        check_export(tmp_path / "net.onnx")
    check_export(tmp_path / "net.pth")


def test_an_old_torch_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.0.1+cu118")
    with pytest.raises(ConfigError, match="ONNX with torch 2.0.1.*; wanted torch 2.6 or newer; fix: "):
        check_export(tmp_path / "net.onnx")


def test_what_cannot_be_written_is_refused_before_weights_are_read(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    for name, message in (
        ("net.h5", "ends in .onnx, .pth, .safetensors"),
        ("net", "ends in"),
        ("absent/net.pth", "no folder"),
        ("folder.pth", "is a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_export(tmp_path / name)


def test_a_full_disk_leaves_the_old_file(tmp_path, narrow, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(module.WRITERS, ".pth", full)
    (tmp_path / "net.pth").write_text("old")
    with pytest.raises(RunError, match="not written: No space left on device"):
        export(net(tmp_path), tmp_path / "net.pth")
    assert (tmp_path / "net.pth").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_weights_of_any_memory_layout_are_exported(tmp_path, narrow):
    """As a .pth file may hold them."""
    whole = net(tmp_path)
    layout = dict(whole.weights)
    layout["features.0.weight"] = layout["features.0.weight"].to(memory_format=torch.channels_last)
    export(TrainedModel(whole.info, layout), tmp_path / "net.safetensors")
    save_file(whole.weights, tmp_path / "wanted.safetensors")
    found, wanted = (load_file(tmp_path / name) for name in ("net.safetensors", "wanted.safetensors"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
