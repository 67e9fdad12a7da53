"""Images from anywhere: what is read, and what is refused by name."""

import json
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from evodiff.data import mnist_digits
from evodiff.errors import MetricError
from evodiff.metrics import images as module
from evodiff.metrics.cli import score_path_main
from evodiff.metrics.images import read_images
from evodiff.metrics.moments import Moments
from evodiff.metrics.protocol import protocol
from evodiff.pictures import save_pngs

MNIST = protocol("mnist")


@pytest.fixture(scope="module")
def digits():
    return mnist_digits()[0][::50]


def save_png(folder, images):
    save_pngs(folder, range(len(images)), images.numpy())
    return folder


def test_a_folder_is_searched_through_links_and_not_in_hidden_places(tmp_path, digits):
    save_png(tmp_path / "images" / ".ipynb_checkpoints", digits[:2])
    save_png(tmp_path / "elsewhere", digits[2:5])
    (tmp_path / "images" / "threes").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "images")
    assert torch.equal(torch.cat([*read_images(tmp_path / "images", 1)]), digits[2:5])


def test_what_cannot_be_read_of_a_folder_a_zip_or_moments_is_named(tmp_path, digits):
    folder = save_png(tmp_path / "images", digits[:2])
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MetricError, match=r"gone.png cannot be read: No such file"):
        [*read_images(folder, 1)]
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(range(256)) * 40)
    content = bytearray((tmp_path / "images.zip").read_bytes())
    content[60:80] = b"\xff" * 20
    (tmp_path / "images.zip").write_bytes(content)
    with pytest.raises(MetricError, match=r"a.png in .*images.zip cannot be read"):
        [*read_images(tmp_path / "images.zip", 1)]
    moments = tmp_path / "moments.npz"
    np.savez(moments, n=4, total=np.zeros(64), outer=np.zeros((64, 64)), made_by="x")
    content = bytearray(moments.read_bytes())
    content[len(content) // 2] ^= 1
    moments.write_bytes(content)
    with pytest.raises(MetricError, match="holds no moments"):
        Moments.load(moments)


def test_colours_of_16_bits_are_refused(tmp_path):
    """Pillow has no such images and keeps their high bytes; so the file is written by hand."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(12) for _ in range(2))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(png)
    with pytest.raises(MetricError, match="has mode RGB, of 16 bits, but this protocol scores 8-bit RGB images"):
        [*read_images(tmp_path, 3)]


@pytest.mark.parametrize("kind", ["P6", "P3"])
def test_a_ppm_of_16_bits_is_refused_and_one_of_8_is_not(tmp_path, kind):
    for most in (65535, 255, 7):
        values = "3 " * 12 if kind == "P3" else "\0" * 12 * (2 if most > 255 else 1)
        (tmp_path / "a.ppm").write_bytes(f"{kind}\n2 2\n{most}\n{values}".encode())
        if most > 255:
            with pytest.raises(MetricError, match="a.ppm has mode RGB, of 16 bits"):
                [*read_images(tmp_path, 3)]
        else:
            assert len(torch.cat([*read_images(tmp_path, 3)])) == 1


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_a_file_of_several_images_is_refused(tmp_path, digits, ending):
    first, *others = (Image.fromarray(image[0].numpy()) for image in digits[:3])
    first.save(tmp_path / f"all.{ending}", save_all=True, append_images=others)
    with pytest.raises(MetricError, match=f"all.{ending} holds 3 images; save each in a file of its own"):
        [*read_images(tmp_path, 1)]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_every_entry_of_a_zip_is_read_and_no_folder(tmp_path, digits):
    folder = save_png(tmp_path / "png", digits[:2])
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.mkdir("set.png")
        for i in range(2):
            archive.write(folder / f"{i:06d}.png", "set.png/same.png")
    assert torch.equal(torch.cat([*read_images(tmp_path / "a.zip", 1)]), digits[:2])


def test_an_array_of_images_is_held_once(tmp_path, digits):
    """Batches are parts of it, whatever their size, and not of a copy."""
    for size in (33, 100, 1000):
        batches = [*module._rebatched(tmp_path, iter([("images.npz", digits)]), size)]
        assert torch.equal(torch.cat(batches), digits)
        assert {b.untyped_storage().data_ptr() for b in batches} == {digits.untyped_storage().data_ptr()}


def test_a_manifest_of_something_else_makes_no_run(digits, tmp_path):
    folder = save_png(tmp_path / "png", digits)
    expected = torch.cat(list(read_images(folder, 1)))
    for content in ("{", "[1]", "{}", '{"shards": 3}', '{"shards": [{"file": "a"}]}'):
        (folder / "manifest.json").write_text(content)
        assert torch.equal(torch.cat(list(read_images(folder, 1))), expected)


def grey(folder, name, size=(32, 32), mode="L"):
    folder.mkdir(exist_ok=True)
    image = Image.new(mode, size) if mode == "I;16" else Image.effect_noise(size, 50).convert(mode)
    image.save(folder / name)


def bad_folder(tmp_path, kind):
    folder = tmp_path / "bad"
    grey(folder, "a.png")
    if kind == "colour":
        grey(folder, "b.png", mode="RGB")
    elif kind == "alpha":
        grey(folder, "b.png", mode="RGBA")
    elif kind == "16 bit":
        grey(folder, "b.png", mode="I;16")
    elif kind == "other size":
        grey(folder, "b.png", size=(28, 28))
    elif kind == "cut":
        (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:500])
    elif kind == "text":
        (folder / "b.png").write_text("no image")
    return folder


@pytest.mark.parametrize("kind", ["colour", "alpha", "16 bit", "other size", "cut", "text"])
def test_a_bad_image_is_refused_by_name(kind, tmp_path):
    with pytest.raises(MetricError, match="b.png"):
        score_path_main([f"path={bad_folder(tmp_path, kind)}", "protocol=mnist"])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 1, 32, 32), np.float32) - 1, "floats from -1"),
        (np.full((4, 1, 32, 32), 300.0), "expected 0..255"),
        (np.linspace(0, 1, 4 * 32 * 32).reshape(4, 1, 32, 32), "floats from 0 to 1"),
        (np.linspace(0, 1.02, 4 * 32 * 32).reshape(4, 1, 32, 32), "looks like 0..1 with overshoot"),
        (np.full((4, 1, 32, 32), np.nan), "expected 0..255"),
        (np.zeros((4, 1, 32, 32), np.int64), "int64"),
        (np.zeros((4, 32, 32, 3), np.uint8), "grey images"),
        (np.zeros((4, 32)), "holds images"),
    ],
)
def test_arrays_that_are_no_images_are_refused_by_name(array, message, tmp_path):
    np.savez(tmp_path / "wrong.npz", images=array)
    with pytest.raises(MetricError, match=message) as error:
        list(read_images(tmp_path / "wrong.npz", channels=1))
    assert "wrong.npz" in str(error.value)


def test_a_changed_shard_and_a_broken_zip_are_refused(digits, tmp_path):
    np.savez(tmp_path / "shard-000000.npz", images=digits.numpy())
    listed = {"first": 0, "last": 99, "sha256": "0" * 64}
    manifest = {"run": {"seeds": [0, 99], "rounding": "round"}, "shards": [listed]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MetricError, match="shard-000000"):
        list(read_images(tmp_path, channels=1))
    with pytest.raises(MetricError, match="sampled with rounding=round, but .* rounding=truncate"):
        list(read_images(tmp_path, channels=1, rounding="truncate"))
    manifest["run"]["seeds"] = [0, 999]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MetricError, match="has 100 of its 1000 images: run the sampling again"):
        list(read_images(tmp_path, channels=1))
    np.save(tmp_path / "array.npy", digits.numpy())
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(MetricError, match=r"array\.npz is no readable npz"):
        list(read_images(tmp_path / "array.npz", channels=1))
    (tmp_path / "broken.zip").write_text("no zip")
    with pytest.raises(MetricError, match="broken.zip"):
        list(read_images(tmp_path / "broken.zip", channels=1))
