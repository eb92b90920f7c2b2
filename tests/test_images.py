import pickle
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from psenet import images
from psenet.data import load_data
from psenet.errors import InputError
from psenet.images import Look, make_transform

UNIT = Look(mean=(0.0,), std=(1.0,))


def counted(height: int, width: int) -> torch.Tensor:
    """Return an image of one channel whose pixels are 1, 2, 3 ..., so that each can be told from each and from 0."""
    return torch.arange(1, height * width + 1, dtype=torch.uint8).view(1, height, width)


def shifted(image_CHW: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Return a small image shifted over black, by indexing pixel for pixel."""
    out_CHW = torch.zeros_like(image_CHW)
    size = image_CHW.shape[1]
    for row in range(size):
        for column in range(size):
            if 0 <= row - down < size and 0 <= column - right < size:
                out_CHW[:, row, column] = image_CHW[:, row - down, column - right]
    return out_CHW


def test_small_images_are_shifted_over_black_and_mirrored_in_every_way():
    image_CHW = counted(8, 8)
    expected = {}
    for down in range(-1, 2):
        for right in range(-1, 2):
            once = shifted(image_CHW, down, right)
            expected[tuple(once.flatten().tolist())] = 0
            expected[tuple(once.flip(2).flatten().tolist())] = 0
    transform = make_transform(8, Look(mean=(0.0,), std=(1.0,), pad=1), augment=True)
    torch.manual_seed(0)
    for _ in range(1800):
        expected[tuple(transform(image_CHW).int().flatten().tolist())] += 1
    # 18 equally likely views, 100 times each on average; 10 is the standard deviation.
    assert len(expected) == 18
    assert min(expected.values()) > 50 and max(expected.values()) < 150


def test_digits_are_never_mirrored():
    image_CHW = counted(8, 8)
    transform = make_transform(8, Look(mean=(0.0,), std=(1.0,), pad=1, flip=False), augment=True)
    seen = {tuple(transform(image_CHW).int().flatten().tolist()) for _ in range(300)}
    views = {tuple(shifted(image_CHW, down, right).flatten().tolist()) for down in (-1, 0, 1) for right in (-1, 0, 1)}
    assert seen == views


@pytest.mark.parametrize("size", [32, 96])
def test_augmentation_is_reproducible_from_the_global_seed(size):
    image_CHW = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    transform = make_transform(size, Look(mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0)), augment=True)
    torch.manual_seed(5)
    first = [transform(image_CHW) for _ in range(6)]
    torch.manual_seed(5)
    second = [transform(image_CHW) for _ in range(6)]
    assert torch.equal(torch.stack(first), torch.stack(second))
    assert not all(torch.equal(first[0], other) for other in first[1:])
    assert first[0].shape == (3, size, size)


def test_a_transform_leaves_the_stored_image_alone():
    image_CHW = counted(8, 8)
    for augment in (False, True):
        make_transform(8, Look(mean=(3.0,), std=(2.0,)), augment=augment)(image_CHW)
    assert torch.equal(image_CHW, counted(8, 8))


def test_pixels_are_normalised():
    transform = make_transform(8, Look(mean=(10.0,), std=(4.0,)), augment=False)
    assert torch.equal(transform(counted(8, 8)), (counted(8, 8).float() - 10) / 4)


def test_without_augmentation_a_large_image_gives_its_central_part():
    stored = round(96 / 0.875)
    image_CHW = torch.randint(0, 256, (1, stored, stored), dtype=torch.uint8)
    seen = make_transform(96, UNIT, augment=False)(image_CHW)
    assert torch.equal(seen, image_CHW[:, 7:103, 7:103].float())


def test_oblong_images_give_their_central_square():
    seen = make_transform(8, UNIT, augment=False)(counted(8, 16))
    assert torch.equal(seen, counted(8, 16)[:, :, 4:12].float())


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("size", [32, 96])
def test_transforms_travel_to_worker_processes(size, augment):
    image_CHW = torch.randint(0, 256, (1, size, size), dtype=torch.uint8)
    transform = make_transform(size, UNIT, augment=augment)
    torch.manual_seed(0)
    expected = transform(image_CHW)
    torch.manual_seed(0)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image_CHW), expected)


@pytest.mark.parametrize(("side", "expected"), [(20, 20), (64, 64), (65, 224)])
def test_the_working_size_is_the_images_own_where_they_are_small(image_tree, side, expected):
    assert load_data(str(image_tree({"cat": 8, "dog": 8}, side=side))).input_shape == (3, expected, expected)


def test_the_working_size_can_be_given(image_tree):
    data = load_data(str(image_tree({"cat": 8, "dog": 8}, side=20)), image_size=12)
    assert data.input_shape == (3, 12, 12)
    assert data.train[0][0].shape == data.test[0][0].shape == (3, 12, 12)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_every_mode_become_rgb(image_tree, mode):
    root = image_tree({"cat": 8, "dog": 8})
    for path in root.rglob("*.png"):
        Image.open(path).convert(mode).save(path.with_suffix(".tiff"))
        path.unlink()
    assert load_data(str(root)).test[0][0].shape == (3, 16, 16)


def first_values(folder: Path) -> list[int]:
    """Return the values of the first pixel as they are decoded."""
    data = load_data(str(folder), image_size=16)
    mean_C, std_C = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((data.test[0][0][:, 8, 8] * std_C + mean_C) * 255).round().int().tolist()


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_grey_images_of_16_bits_keep_their_grey(image_tree, suffix):
    root = image_tree({"cat": 8, "dog": 8})
    for path in root.rglob("*.png"):
        path.unlink()
        Image.fromarray(np.full((16, 16), 100 * 256 + 7, dtype=np.uint16)).save(path.with_suffix(suffix))
    assert first_values(root) == [100, 100, 100]


def test_of_an_animation_the_first_frame_is_taken(image_tree):
    root = image_tree({"cat": 8, "dog": 8})
    frames = [Image.new("RGB", (16, 16), (value, 50, 60)) for value in (40, 140, 240)]
    for path in list(root.rglob("*.png")):
        frames[0].save(path, save_all=True, append_images=frames[1:])
    assert first_values(root) == [40, 50, 60]


def test_images_in_formats_that_are_not_read_are_counted(image_tree):
    root = image_tree({"cat": 8, "dog": 8})
    for name in ("cat/1.gif", "dog/1.GIF", "dog/2.heic"):
        (root / name).touch()
    with pytest.warns(UserWarning, match=r"formats that are not read: 2 \.gif, 1 \.heic; save them as \.png"):
        load_data(str(root))


def test_links_are_followed_also_out_of_the_folder(image_tree, tmp_path):
    root = image_tree({"cat": 8, "dog": 8})
    store = tmp_path / "store"
    (root / "dog").rename(store)
    (root / "dog").symlink_to(store)
    (root / "cat" / "0.png").rename(store.with_suffix(".png"))
    (root / "cat" / "0.png").symlink_to(store.with_suffix(".png"))
    data = load_data(str(root))
    assert data.class_names == ("cat", "dog")
    splits: list[Any] = [data.train, data.calibration, data.validation, data.test]
    assert sum(len(split) for split in splits) == 16


def break_three(root: Path) -> None:
    (root / "cat" / "1.png").write_text("no image")
    whole = (root / "dog" / "2.png").read_bytes()
    (root / "dog" / "2.png").write_bytes(whole[: len(whole) // 2])
    (root / "dog" / "3.png").write_bytes(b"")


@pytest.mark.parametrize("side", [16, 80])
def test_unreadable_images_are_named_together(image_tree, side):
    root = image_tree({"cat": 8, "dog": 8}, side=side)
    break_three(root)
    with pytest.raises(InputError, match="every image must be readable; 3 are not: ") as caught:
        load_data(str(root))
    assert set(re.findall(r"\w+/\d\.png", str(caught.value))) == {"cat/1.png", "dog/2.png", "dog/3.png"}


def test_at_most_ten_unreadable_images_are_listed(image_tree):
    root = image_tree({"cat": 8, "dog": 8})
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="16 are not: .* and 6 more") as caught:
        load_data(str(root))
    assert len(re.findall(r"\d\.png", str(caught.value))) == 10


@pytest.mark.parametrize("in_memory", [True, False])
def test_unreadable_images_are_left_out_and_counted_if_asked(image_tree, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr(images, "_MAX_BYTES_IN_MEMORY", 0)
    root = image_tree({"cat": 8, "dog": 8})
    break_three(root)
    with pytest.warns(UserWarning, match=r"left out 3 unreadable images: .*\.png"):
        data = load_data(str(root), skip_unreadable=True)
    splits = (data.train, data.calibration, data.validation, data.test)
    items = [split[index] for split in splits for index in range(len(split))]  # pyright: ignore[reportArgumentType]
    assert sorted(label for _, label in items) == [0] * 7 + [1] * 6


def test_a_class_that_loses_all_training_images_is_named(image_tree):
    root = image_tree({"cat": 8, "dog": 8})
    for path in (root / "dog").iterdir():
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="left out 8 unreadable images"),
        pytest.raises(InputError, match="no readable training image is left of the classes: dog"),
    ):
        load_data(str(root), skip_unreadable=True)


def test_large_sets_are_read_when_asked_for_and_name_a_bad_image_then(image_tree, monkeypatch):
    root = str(image_tree({"cat": 8, "dog": 8}, side=80))
    stored = load_data(root)
    monkeypatch.setattr(images, "_MAX_BYTES_IN_MEMORY", 0)
    lazy = load_data(root)
    for index in range(len(stored.test)):  # pyright: ignore[reportArgumentType]
        assert torch.equal(stored.test[index][0], lazy.test[index][0])
    for file in Path(root).rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(InputError, match=r"one is not: .*\.png \(not an image\)"):
        lazy.train[0]


# Huge, tiny and long images -------------------------------------------------------------------------------------------


def save_striped(path: Path, width: int, height: int, **options: Any) -> None:
    """Save an image whose left half is red and whose right half is blue."""
    pixels_HWC = np.zeros((height, width, 3), dtype=np.uint8)
    pixels_HWC[:, : width // 2, 0] = pixels_HWC[:, width // 2 :, 2] = 255
    Image.fromarray(pixels_HWC).save(path, **options)


@pytest.mark.parametrize("most", [300, 150, 70], ids=["warned of", "refused by PIL", "an eighth"])
def test_a_huge_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path, monkeypatch, most):
    save_striped(tmp_path / "huge.jpg", 24, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    image_CHW = images.FilePool([str(tmp_path / "huge.jpg")], np.zeros(1, dtype=np.int64)).read(0)
    assert image_CHW[0].numel() <= most
    assert image_CHW.shape[2] in (12, 6, 3)
    red, _, blue = image_CHW[:, 0].int()
    assert red[0] > 200 > 60 > red[-1] and blue[-1] > 200 > 60 > blue[0]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("huge.png", {}, "more than 100 pixels: save it smaller"),
        ("huge.jpg", {"progressive": True}, "24 x 20 pixels, more than 100: save it smaller"),
    ],
)
def test_a_huge_image_that_cannot_be_made_smaller_is_named(image_tree, monkeypatch, name, options, words):
    root = image_tree({"cat": 8, "dog": 8}, side=8)
    save_striped(root / "cat" / name, 24, 20, **options)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=rf"1 are not: \S*cat/{name} \({words}\)\. Repair or remove"):
        load_data(str(root))


def test_a_jpeg_that_is_too_large_even_at_an_eighth_is_refused(tmp_path, monkeypatch):
    save_striped(tmp_path / "huge.jpg", 240, 200)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="240 x 200 pixels, more than 100: save it smaller"):
        images.FilePool([str(tmp_path / "huge.jpg")], np.zeros(1, dtype=np.int64)).read(0)


def test_a_bomb_is_refused_by_its_header_without_decoding_it(image_tree):
    root = image_tree({"cat": 8, "dog": 8})
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000)))):
        chunk = kind + content
        bomb += struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (root / "cat" / "bomb.png").write_bytes(bomb)
    with pytest.raises(InputError, match=r"1 are not: \S*bomb\.png \(more than 89478485 pixels: save it smaller\)"):
        load_data(str(root))


def test_a_bomb_in_a_data_set_of_timm_is_named(monkeypatch):
    class Bombs(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Any:
            raise Image.DecompressionBombError("Image size (900000000 pixels) exceeds limit")

    pool = images.TimmPool(Bombs(), np.zeros(1, dtype=np.int64))
    with pytest.raises(InputError, match=r"1 are not: image 0 \(Image size \(900000000 pixels\) exceeds limit\)"):
        images.decode(pool, {"train": np.arange(1)}, size=16, num_channels=3, skip_unreadable=False)


@pytest.mark.parametrize("size", [16, 96])
@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 20_000), (20_000, 1), (3, 500)])
def test_tiny_and_long_images_give_what_the_model_takes_and_need_little_memory(
    monkeypatch, size, augment, width, height
):
    from torchvision.transforms.v2 import functional

    scaled: list[int] = []
    resize = functional.resize

    def counted_resize(image_CHW: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        out_CHW = resize(image_CHW, *args, **options)
        scaled.append(out_CHW.numel())
        return out_CHW

    monkeypatch.setattr(functional, "resize", counted_resize)
    image_CHW = torch.full((3, height, width), 200, dtype=torch.uint8)
    out_CHW = make_transform(size, Look(mean=(0.0,) * 3, std=(1.0,) * 3, pad=0), augment=augment)(image_CHW)
    assert out_CHW.shape == (3, size, size)
    assert (out_CHW == 200).all()
    assert max(scaled, default=0) <= 3 * 4 * 110 * 110


def test_the_middle_of_a_long_image_is_what_remains():
    image_CHW = torch.zeros((1, 2, 100), dtype=torch.uint8)
    image_CHW[:, :, 49:51] = 9
    out_CHW = make_transform(2, UNIT, augment=False)(image_CHW)
    assert (out_CHW == 9).all()
