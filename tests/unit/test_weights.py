"""Weights from runs, checkpoints and files: what is read, what is refused, and that nothing is unpickled."""

import io
import os
import pickle
import tarfile
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import alexnet

from horovod_owt.errors import ConfigError, RunError
from horovod_owt.inference.weights import metadata, read_trained_model
from horovod_owt.model import alexnet_owt, build_model
from horovod_owt.runs.checkpoints import drop_old, record_score
from horovod_owt.train.checkpoint import Checkpoint, write_checkpoint

pytestmark = pytest.mark.timeout(60)
CPU = torch.device("cpu")
CLASSES = ["cat", "dog", "eel"]


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(alexnet_owt, "HIDDEN", 7)


def net(seed=0, model="alexnet-owt", classes=3) -> dict[str, torch.Tensor]:
    return build_model(model, classes, seed=seed).state_dict()


def write(run_dir: Path, step: int, **state) -> Path:
    about = {"config": {"image_size": 96}, "data": {"classes": CLASSES}, **state}
    weights = {name: tensor.clone() for name, tensor in net(step).items()}
    return write_checkpoint(run_dir, Checkpoint(weights, {}, {"step": step, **about}))


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_run_stands_for_its_best_checkpoint_or_its_newest(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert read_trained_model(tmp_path).info.step == 3  # no validation yet
    record_score(tmp_path, step=2, epoch=1.0, top1=50.0)
    best = read_trained_model(tmp_path)
    assert best.info.step == 2 and equal(best.weights, net(2))
    assert (best.info.class_names, best.info.image_size) == (tuple(CLASSES), 96)
    assert read_trained_model(tmp_path, newest=True).info.step == 3
    assert read_trained_model(tmp_path / "checkpoints" / "step-00000001").info.step == 1


def test_a_damaged_checkpoint_is_passed_over_in_a_run_and_refused_by_name(tmp_path, caplog):
    write(tmp_path, 1)
    damaged = write(tmp_path, 2)
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert read_trained_model(tmp_path).info.step == 1 and "step-00000002 skipped" in caplog.text
    with pytest.raises(RunError, match="step-00000002: model.safetensors does not match"):
        read_trained_model(damaged)
    (tmp_path / "checkpoints" / "step-00000001" / "state.json").unlink()
    with pytest.raises(RunError, match="none of 2 checkpoints is intact"):
        read_trained_model(tmp_path)


def test_a_checkpoint_without_class_names_is_read(tmp_path):
    """As runs before the data set's identity wrote them."""
    write(tmp_path, 1, data={}, config={})
    info = read_trained_model(tmp_path).info
    assert info.class_names == () and info.image_size == 224


def test_a_run_that_writes_and_deletes_can_be_read(tmp_path):
    """What is read is always whole: weights and step belong together."""
    weights = net()

    def write_step(step: int) -> None:
        state = {"step": step, "config": {}, "data": {}}
        marked = {name: torch.full_like(tensor, step) for name, tensor in weights.items()}
        write_checkpoint(tmp_path, Checkpoint(marked, {}, state))
        drop_old(tmp_path, keep=1, newest=step)

    def train():
        for step in range(2, 25):
            write_step(step)

    write_step(1)
    writer = threading.Thread(target=train)
    writer.start()
    steps = []
    while writer.is_alive():
        found = read_trained_model(tmp_path, newest=True)
        assert all((tensor == found.info.step).all() for tensor in found.weights.values())
        steps.append(found.info.step)
    writer.join()
    assert steps == sorted(steps) and len(set(steps)) > 3


@pytest.mark.parametrize(
    ("folder", "message"), [("", "is no run folder"), ("checkpoints", "has no checkpoints yet")]
)
def test_a_folder_without_checkpoints_is_one_line(tmp_path, folder, message):
    (tmp_path / "run" / folder).mkdir(parents=True)
    with pytest.raises(ConfigError, match=message):
        read_trained_model(tmp_path / "run")


def test_what_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="absent: No such file"):
        read_trained_model(tmp_path / "absent")


@pytest.mark.parametrize(("wrapped", "legacy"), [("plain", True), ("nested", False), ("parallel", False)])
def test_torchvisions_weights_are_read(tmp_path, monkeypatch, legacy, wrapped):
    monkeypatch.setattr(alexnet_owt, "HIDDEN", 4096)
    torch.manual_seed(0)
    theirs = alexnet(num_classes=5).eval()
    state = theirs.state_dict()
    saved = {
        "plain": state,
        "nested": {"epoch": 3, "arch": "alexnet", "state_dict": state},
        # as PyTorch's ImageNet example wraps an alexnet
        "parallel": {"state_dict": {n.replace("features.", "features.module."): state[n] for n in state}},
    }[wrapped]
    torch.save(saved, tmp_path / "net.pth", _use_new_zipfile_serialization=not legacy)
    found = read_trained_model(tmp_path / "net.pth")
    assert (found.info.model, found.info.classes, found.info.class_names) == ("alexnet-owt", 5, ())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(found.build(CPU)(images), theirs(images))


def test_the_batch_normalised_net_is_recognised(tmp_path):
    torch.save(net(model="alexnet-owt-bn"), tmp_path / "net.pth")
    assert read_trained_model(tmp_path / "net.pth").info.model == "alexnet-owt-bn"


def test_a_safetensors_file_says_its_classes(tmp_path):
    write(tmp_path, 1)
    info = read_trained_model(tmp_path).info
    save_file(net(1), tmp_path / "net.safetensors", metadata=metadata(info))
    found = read_trained_model(tmp_path / "net.safetensors").info
    assert (found.class_names, found.image_size) == (info.class_names, 96)
    save_file(net(1), tmp_path / "others.safetensors", metadata={"classes": "[", "image_size": "x"})
    assert read_trained_model(tmp_path / "others.safetensors").info.class_names == ()


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def pickled(protocol: int) -> bytes:
    return pickle.dumps({"state_dict": Malicious()}, protocol=protocol)


def legacy_tar() -> bytes:
    """The format of torch 0.1, whose pickles torch itself read without a check until 2.6."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("\x80", "sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(pickled(2))
            tar.addfile(entry, io.BytesIO(pickled(2)))
    return out.getvalue()


def torch_saved(value) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


REFUSED = {
    "empty": (b"", "is empty"),
    "a web page": (b"<!DOCTYPE html><html>404", "no file of weights: it begins with b'<!DOCTYPE'"),
    "a pickle": (pickled(4), "Python objects|a pickle of other things"),
    "a pickle in torch's format": (torch_saved({"a": Malicious()}), r"Python objects \(posix.mkdir\)"),
    "a whole module": (torch_saved(torch.nn.Linear(2, 2)), "contains Python objects"),
    "a tar": (legacy_tar(), "no file of weights"),
    "a list": (torch_saved([1, 2]), "contains a list, not a state dict"),
    "numbers": (torch_saved({"lr": 0.1}), "contains a dict, not a state dict"),
    "a zip": (b"PK\x03\x04" + bytes(100), "truncated or no file of torch"),
    "safetensors of nothing": (b"\x08\0\0\0\0\0\0\0{garbage", "a whole .safetensors file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_foreign_file_is_one_line_and_runs_nothing(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    content, message = REFUSED[case]
    (tmp_path / "net.pth").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_trained_model(tmp_path / "net.pth")
    assert "\n" not in str(caught.value) and "net.pth" in str(caught.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("suffix", ["pth", "legacy.pth", "safetensors"])
def test_a_file_cut_short_anywhere_is_one_line(tmp_path, suffix):
    file = tmp_path / f"net.{suffix}"
    if suffix == "safetensors":
        save_file(net(), file)
    else:
        torch.save(net(), file, _use_new_zipfile_serialization=suffix == "pth")
    content = file.read_bytes()
    for share in (0.0001, 0.01, 0.3, 0.9, 0.999999):
        file.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ConfigError) as caught:
            read_trained_model(file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("features.0.bias"), "has no features.0.bias"),
        (lambda w: w.update({"features.0.weight": torch.zeros(64, 3, 7, 7)}), "features.0.weight of shape"),
        (lambda w: w.update({"extra": torch.zeros(1)}), "has extra of shape"),
        (lambda w: w.clear(), "has no features.0.weight"),
        (lambda w: w["classifier.6.bias"].fill_(float("nan")), "classifier.6.bias contains NaN"),
        (lambda w: w["features.0.weight"][0, 0, 0, 0].fill_(float("inf")), "features.0.weight contains NaN"),
    ],
)
def test_another_net_is_told_by_its_first_difference(tmp_path, change, message):
    weights = net()
    change(weights)
    torch.save(weights, tmp_path / "net.pth")
    with pytest.raises(ConfigError, match=message):
        read_trained_model(tmp_path / "net.pth")
