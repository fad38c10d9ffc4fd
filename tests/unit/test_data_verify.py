import importlib.util
import json
import shutil

import numpy as np
import pytest
from bad_files import BAD, ODD, encoded, spoil, undecodable
from click.testing import CliRunner
from PIL import Image

from horovod_owt.cli import cli
from horovod_owt.data import verify as module
from horovod_owt.data.build import Form
from horovod_owt.data.header import read_header
from horovod_owt.data.pack import pack
from horovod_owt.data.remarks import ILSVRC2012_CMYK, remark
from horovod_owt.data.stats import data_stats
from horovod_owt.data.store import open_data_set
from horovod_owt.data.synthetic import write_synthetic
from horovod_owt.data.verify import PillowDecoder, make_decoder, merged, verify
from horovod_owt.errors import ProblemFound

pytestmark = pytest.mark.timeout(60)

needs_dali = pytest.mark.skipif(not importlib.util.find_spec("nvidia.dali"), reason="DALI is not installed")
KINDS = [pytest.param("dali", marks=needs_dali), "torchvision"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    root = tmp_path_factory.mktemp("sound") / "set"
    write_synthetic(root, classes=2, train_per_class=20, val_per_class=5, size=(60, 90), workers=1)
    return root


@pytest.fixture
def spoilt(sound, tmp_path):
    """Root, path -> fault."""
    root = shutil.copytree(sound, tmp_path / "set")
    paths = sorted(map(str, (root / "train").rglob("*.JPEG")))
    return root, spoil(paths[2 : 2 + 2 * len(BAD) : 2])


def look(root, decoder, **where):
    data, seen = open_data_set(root), []
    where = {"rank": 0, "world_size": 1, **where}
    stores = {"train": data.train, "val": data.val}
    found = verify(stores, decoder, progress=lambda done, bad: seen.append((done, bad)), **where)
    assert sum(done for done, _ in seen) == found.images
    assert [finding for _, bad in seen for finding in bad] == found.bad
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 3, 60])  # 50 images: with 60 ranks some have none
def test_every_bad_file_is_found_once_at_any_number_of_ranks(spoilt, kind, world_size, monkeypatch):
    root, bad = spoilt
    monkeypatch.setattr(module, "GROUP", 7)
    decoder = make_decoder(kind, threads=2, device_id=None)
    parts = [look(root, decoder, rank=rank, world_size=world_size).to_dict() for rank in range(world_size)]
    whole = merged(json.loads(json.dumps(parts)))
    assert whole.images == 50 and not whole.stopped
    assert [finding.path for finding in whole.bad] == sorted(bad)
    assert all(bad[finding.path] in finding.text for finding in whole.bad)


class Recorder(PillowDecoder):
    def __init__(self):
        super().__init__(1)
        self.groups = []

    def faults(self, images):
        self.groups.append([read_header(image) for image in images])
        return super().faults(images)


def test_large_images_are_decoded_by_themselves(sound, tmp_path, monkeypatch):
    root = shutil.copytree(sound, tmp_path / "set")
    large = sorted((root / "train").rglob("*.JPEG"))[13]
    large.write_bytes(encoded(size=(900, 700)))
    monkeypatch.setattr(module, "GROUP_PIXELS", 100_000)
    decoder = Recorder()
    assert look(root, decoder).images == 50
    pixels = [sum(header.height * header.width for header in group) for group in decoder.groups]
    assert all(
        total <= 100_000 or len(group) == 1 for total, group in zip(pixels, decoder.groups, strict=True)
    )
    assert sum(map(len, decoder.groups)) == 50 and max(pixels) == 630_000


def test_ctrl_c_ends_it_with_what_was_found(spoilt, monkeypatch):
    root, _ = spoilt
    monkeypatch.setattr(module, "GROUP", 10)

    class Interrupted(Recorder):
        def faults(self, images):
            if self.groups:
                raise KeyboardInterrupt
            return super().faults(images)

    found = look(root, Interrupted())
    assert found.stopped and 10 <= found.images < 40 and found.bad


def test_packed_samples_have_the_faults_of_their_files_and_of_their_checksums(spoilt, tmp_path):
    root, bad = spoilt
    pack(root, tmp_path / "packed", Form(), workers=1)
    of_files, of_samples = look(root, PillowDecoder(1)), look(tmp_path / "packed", PillowDecoder(1))
    assert [(bad.index, bad.text) for bad in of_samples.bad] == [
        (bad.index, bad.text) for bad in of_files.bad
    ]

    known, sample = {bad.index for bad in of_samples.bad}, open_data_set(root).train.read(1)
    assert 1 not in known
    (shard,) = (tmp_path / "packed" / "train").glob("*.tar")
    packed = bytearray(shard.read_bytes())
    packed[packed.index(sample) + len(sample) // 2] ^= 1  # one bit amid the pixels: it still decodes
    shard.write_bytes(packed)
    (new,) = [bad for bad in look(tmp_path / "packed", PillowDecoder(1)).bad if bad.index not in known]
    assert new.index == 1 and "differs from the image that was packed: crc32" in new.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_continues_after_an_image_it_rejects(kind):
    decoder = make_decoder(kind, threads=2, device_id=None)
    good, bad = encoded(), undecodable()
    assert decoder.faults([bad, good, bad, good]).keys() == {0, 2}
    assert decoder.faults([good] * 64) == {}
    assert decoder.faults([bad]).keys() == {0}


def test_known_oddities_of_ilsvrc2012_are_remarked():
    png, cmyk = (read_header(data) for data, _ in ODD.values())
    jpeg = read_header(encoded())
    assert len(ILSVRC2012_CMYK) == 22
    assert remark("/x/n02105855/n02105855_2933.JPEG", png) == "PNG named .JPEG, known in ILSVRC2012"
    assert remark("/x/n02105855/n02105855_2934.JPEG", png) == "PNG named .JPEG"
    assert remark("/x/n13037406/n13037406_4650.JPEG", cmyk) == "CMYK JPEG, known in ILSVRC2012"
    assert remark("a.jpg", cmyk) == "CMYK JPEG"
    assert remark("a.png", jpeg) == "JPEG named .png"
    assert not any(remark(*pair) for pair in (("a.JPG", jpeg), ("n02105855_2933.JPEG", jpeg), ("a.png", png)))


def owt(*argv):
    return CliRunner().invoke(cli, ["data", *map(str, argv)], standalone_mode=False)


def test_the_command_ends_with_3_if_anything_is_bad(sound, spoilt):
    good = owt("verify", sound, "--pipeline", "torchvision")
    assert good.exception is None and "50 images decoded by torchvision" in good.stdout
    root, bad = spoilt
    done = owt("verify", root, "--pipeline", "torchvision", "--json")
    assert isinstance(done.exception, ProblemFound) and done.exception.exit_code == 3
    assert f"bad images: {len(bad)} of 50" in str(done.exception)
    report = json.loads(done.stdout)
    assert report["images"] == 50 and {line["path"] for line in report["bad"]} == bad.keys()
    said = owt("verify", root, "--pipeline", "torchvision", "--split", "train").stdout
    assert all(f"bad     {path}: " in said for path in bad)
    assert owt("verify", root, "--pipeline", "torchvision", "--split", "val").exception is None


# ---- stats ----


def test_stats_are_those_of_numpy(sound):
    store = open_data_set(sound).train
    report = data_stats(open_data_set(sound), sample=1000)
    images = [np.asarray(Image.open(store.path(i)).convert("RGB")) / 255 for i in range(len(store))]
    mean = np.mean([image.mean(axis=(0, 1)) for image in images], axis=0)
    square = np.mean([(image**2).mean(axis=(0, 1)) for image in images], axis=0)
    assert report["sampled"] == 40 and report["bad_in_sample"] == 0
    assert report["mean"] == pytest.approx(mean) and report["std"] == pytest.approx(np.sqrt(square - mean**2))
    widths = [image.shape[1] for image in images]
    assert report["width"] == {"min": min(widths), "median": np.median(widths), "max": max(widths)}
    assert report["images"] == {"train": 40, "val": 10}
    assert report["classes"]["count"] == 2 and report["classes"]["smallest"]["images"] == 20
    sizes = {
        split: sum(path.stat().st_size for path in (sound / split).rglob("*.JPEG"))
        for split in ("train", "val")
    }
    assert report["bytes"] == sizes


def test_a_sample_is_drawn_by_its_seed_and_bad_images_are_left_out(spoilt):
    (root, bad) = spoilt
    data = open_data_set(root)
    one, again, other = (data_stats(data, sample=12, seed=seed) for seed in (0, 0, 1))
    assert one == again and one["mean"] != other["mean"] and one["sampled"] + one["bad_in_sample"] == 12
    everything = data_stats(data, sample=40)
    assert everything["bad_in_sample"] == len(bad) and everything["sampled"] == 40 - len(bad)


def test_stats_prints_text_and_json(sound):
    assert "40 train, 10 val" in owt("stats", sound).stdout
    assert json.loads(owt("stats", sound, "--json", "--sample", "5").stdout)["sampled"] == 5
