from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from psenet.data import DataSplits, load_data, make_loader
from psenet.errors import InputError

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
CIFAR10_ARCHIVE = Path(__file__).parents[2] / "shared" / "data" / "cifar10.tar.xz"


def all_items(dataset: Any) -> list[tuple[torch.Tensor, int]]:
    return [dataset[index] for index in range(len(dataset))]


def sizes(data: DataSplits) -> tuple[int, ...]:
    parts: list[Any] = [data.train, data.calibration, data.validation, data.test]
    return tuple(len(part) for part in parts)


def numbers(dataset: Any) -> list[int]:
    """Return the number that `image_tree` wrote into each image, read from its centre, where no shift reaches."""
    found = []
    for image_CHW, _ in all_items(dataset):
        pixels_CHW = (image_CHW * IMAGENET_STD + IMAGENET_MEAN) * 255
        red, green, _ = pixels_CHW[:, pixels_CHW.shape[1] // 2, pixels_CHW.shape[2] // 2].round().int().tolist()
        found.append(256 * red + green)
    return found


def labels(dataset: Any) -> list[int]:
    return [label for _, label in all_items(dataset)]


def splits_of(data: DataSplits) -> list[Any]:
    return [data.train, data.calibration, data.validation, data.test]


def test_digits_are_divided_into_disjoint_stratified_splits():
    from sklearn.datasets import load_digits

    data = load_data("digits")
    assert (data.name, data.num_classes, data.input_shape) == ("digits", 10, (1, 8, 8))
    assert data.class_names == tuple("0123456789")
    assert sizes(data) == (847, 100, 250, 600)
    # The unaugmented splits are images of the original set, each used at most as often as it occurs there.
    original: Any = load_digits()
    left = [
        (tuple(image.ravel().astype(int)), int(label))
        for image, label in zip(original.images, original.target, strict=True)
    ]
    for split in splits_of(data)[1:]:
        for image_CHW, label in all_items(split):
            pixels = ((image_CHW * 0.3760 + 0.3053) * 16).round().int().flatten().tolist()
            left.remove((tuple(pixels), label))
    assert len(left) == 847
    assert np.bincount(labels(data.train)).tolist() == np.bincount([label for _, label in left]).tolist()
    assert np.ptp(np.bincount(labels(data.test))) <= 3


def test_digits_are_normalised():
    images = torch.stack([image for image, _ in all_items(load_data("digits").test)])
    assert images.dtype == torch.float32
    assert images.mean().item() == pytest.approx(0, abs=0.02)
    assert images.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ({"train/cat": 200, "train/dog": 200, "test/cat": 7, "test/dog": 9}, (296, 64, 40, 16)),
        (
            {"train/cat": 60, "train/dog": 60, "val/cat": 5, "val/dog": 6, "test/cat": 7, "test/dog": 9},
            (90, 30, 11, 16),
        ),
        ({"train/cat": 60, "train/dog": 60, "validation/cat": 10, "validation/dog": 20}, (90, 30, 15, 15)),
        ({"cat": 100, "dog": 300}, (224, 64, 32, 80)),
        ({"Train/cat": 50, "Train/dog": 50}, (54, 18, 8, 20)),
        ({"train": 20, "bus": 20}, (22, 7, 3, 8)),
    ],
)
def test_every_folder_layout_is_divided_into_disjoint_splits(image_tree, folders, expected):
    root = image_tree(folders)
    data = load_data(str(root))
    assert sizes(data) == expected
    found = [numbers(split) for split in splits_of(data)]
    together = [number for split in found for number in split]
    assert sorted(together) == list(range(sum(folders.values())))
    # The images were numbered in the order of the folders: the folder of a number tells its class and its split.
    home = [folder for folder, count in folders.items() for _ in range(count)]
    for split, split_numbers in zip(splits_of(data), found, strict=True):
        assert [data.class_names[label] for label in labels(split)] == [
            home[number].rpartition("/")[2] for number in split_numbers
        ]
    if any(folder.startswith("test/") for folder in folders):
        assert all(home[number].startswith("test/") for number in found[3])


def test_held_out_parts_keep_the_shares_of_the_classes(image_tree):
    data = load_data(str(image_tree({"cat": 100, "dog": 300})))
    for split in splits_of(data)[1:]:
        counts = np.bincount(labels(split))
        assert counts[1] == 3 * counts[0]


def test_rare_classes_stay_in_train_validation_and_test(image_tree):
    data = load_data(str(image_tree({"common": 200, "rare": 4})))
    for split in (data.train, data.validation, data.test):
        assert 1 in labels(split)


def test_the_division_depends_on_the_seed_alone(image_tree):
    root = str(image_tree({"cat": 60, "dog": 60}))
    first = [sorted(numbers(split)) for split in splits_of(load_data(root, seed=1))]
    torch.manual_seed(99)
    assert [sorted(numbers(split)) for split in splits_of(load_data(root, seed=1))] == first
    assert [sorted(numbers(split)) for split in splits_of(load_data(root, seed=2))] != first


def test_fewer_training_images_leave_the_other_splits_alone(image_tree):
    root = str(image_tree({"cat": 60, "dog": 60}))
    full, small = load_data(root), load_data(root, max_train_images=10)
    assert sizes(small) == (10, *sizes(full)[1:])
    assert labels(small.train).count(0) == 5
    assert set(numbers(small.train)) < set(numbers(full.train))
    assert numbers(small.validation) == numbers(full.validation)


def test_loaders_of_one_seed_agree_and_epochs_differ(image_tree):
    data = load_data(str(image_tree({"cat": 30, "dog": 30})))

    def epochs(seed: int) -> list[list[int]]:
        loader = make_loader(data.test, batch_size=5, shuffle=True, seed=seed)
        return [[number for images, _ in loader for number in images[:, 1, 0, 0].tolist()] for _ in range(2)]

    assert epochs(3) == epochs(3)
    assert epochs(3) != epochs(4)
    assert epochs(3)[0] != epochs(3)[1]


def test_loaders_batch_and_may_drop_the_last():
    data = load_data("digits")
    images, batch_labels = next(iter(make_loader(data.train, batch_size=32, shuffle=True)))
    assert images.shape == (32, 1, 8, 8) and images.dtype == torch.float32
    assert batch_labels.shape == (32,) and batch_labels.dtype == torch.int64
    assert len(make_loader(data.calibration, batch_size=32, shuffle=False)) == 4
    assert len(make_loader(data.calibration, batch_size=32, shuffle=False, drop_last=True)) == 3


def test_workers_give_the_same_images(image_tree):
    data = load_data(str(image_tree({"cat": 30, "dog": 30})))
    alone = torch.cat([images for images, _ in make_loader(data.test, batch_size=4, shuffle=False)])
    shared = torch.cat([images for images, _ in make_loader(data.test, batch_size=4, shuffle=False, num_workers=1)])
    assert torch.equal(alone, shared)


def test_impossible_loaders_are_refused():
    data = load_data("digits")
    with pytest.raises(InputError, match="batch size must be at least 1; got 0"):
        make_loader(data.train, batch_size=0, shuffle=False)
    with pytest.raises(InputError, match="a batch size of 101 leaves no full batch of 100 images"):
        make_loader(data.calibration, batch_size=101, shuffle=False, drop_last=True)


@pytest.mark.parametrize("source", ["/no/such/folder", "cifra10", "timm:"])
def test_a_missing_folder_or_unknown_name_is_named(source):
    with pytest.raises(InputError, match=f"there is no data folder '{source}'; the data is an existing folder"):
        load_data(source)


def test_a_file_is_no_data_folder(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"")
    with pytest.raises(InputError, match="must be a folder of images; .*images.zip is a file"):
        load_data(str(tmp_path / "images.zip"))


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=f"the data folder {tmp_path} is empty"):
        load_data(str(tmp_path))


def test_a_folder_of_images_without_classes_is_refused(image_tree):
    root = image_tree({"train": 3, "test": 2})
    with pytest.raises(InputError, match="train must hold one folder of images per class; found 3 files"):
        load_data(str(root))


def test_a_single_class_is_refused(image_tree):
    with pytest.raises(InputError, match="must hold at least two class folders; found only cat"):
        load_data(str(image_tree({"cat": 8})))


def test_classes_without_images_are_named(image_tree):
    root = image_tree({"train/cat": 8, "train/dog": 0, "train/eel": 0})
    (root / "train" / "dog" / "notes.txt").write_text("soon")
    with pytest.raises(InputError, match=r"every class folder in .*train must hold images .* none in: dog, eel"):
        load_data(str(root))


def test_different_classes_in_train_and_test_are_named(image_tree):
    root = image_tree({"train/cat": 8, "train/dog": 8, "test/cat": 2, "test/eel": 2})
    with pytest.raises(InputError, match="must hold the same classes; the second lacks dog and has besides eel"):
        load_data(str(root))


def test_classes_too_small_to_divide_are_named(image_tree):
    with pytest.raises(InputError, match=r"at least 4 train images .* too few: dog \(3\), eel \(1\)"):
        load_data(str(image_tree({"cat": 4, "dog": 3, "eel": 1})))


def test_a_validation_folder_to_be_halved_needs_two_images_of_each_class(image_tree):
    root = image_tree({"train/cat": 8, "train/dog": 8, "val/cat": 2, "val/dog": 1})
    with pytest.raises(InputError, match=r"at least 2 validation images .* too few: dog \(1\)"):
        load_data(str(root))


def test_a_test_folder_without_train_is_refused(image_tree):
    with pytest.raises(InputError, match="has test and no `train` folder"):
        load_data(str(image_tree({"test/cat": 2, "test/dog": 2})))


def test_two_folders_for_one_part_are_refused(image_tree):
    root = image_tree({"train/cat": 8, "train/dog": 8, "val/cat": 2, "validation/cat": 2})
    with pytest.raises(InputError, match="must have one validation folder; found val, validation"):
        load_data(str(root))


def test_settings_out_of_range_are_refused(image_tree):
    root = str(image_tree({"cat": 8, "dog": 8}))
    with pytest.raises(InputError, match="image size must be at least 8 pixels; got 0"):
        load_data(root, image_size=0)
    with pytest.raises(InputError, match="at least one per class, 2 here; got a maximum of 1"):
        load_data(root, max_train_images=1)


def test_an_unknown_timm_data_set_is_explained(tmp_path):
    with pytest.raises(InputError, match=r"could not open 'torch/cifra10' .*Unknown torchvision dataset cifra10"):
        load_data(f"torch/cifra10@{tmp_path}")
    with pytest.raises(InputError, match=r"could not open 'torch/imagenet'.*torch/imagenet@FOLDER"):
        load_data(f"timm:torch/imagenet@{tmp_path}")


def test_a_timm_data_set_is_divided_like_a_folder(image_tree):
    root = image_tree({"train/cat": 40, "train/dog": 40, "validation/cat": 6, "validation/dog": 6})
    data = load_data(f"torch/image_folder@{root}")
    assert sizes(data) == (54, 18, 8, 12)
    assert data.class_names == ("cat", "dog")
    found = [numbers(split) for split in splits_of(data)]
    assert sorted(number for split in found for number in split) == list(range(92))
    assert sorted(found[3]) == list(range(80, 92))


def test_a_timm_data_set_of_a_single_class_is_refused(image_tree):
    root = image_tree({"train/cat": 8, "validation/cat": 6})
    with pytest.raises(InputError, match="a data set must have at least two classes; 'torch/image_folder' has one"):
        load_data(f"torch/image_folder@{root}")


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10_ARCHIVE.exists(), reason="the CIFAR-10 archive is not beside the checkout")
def test_cifar10_is_divided_as_documented(tmp_path):
    import tarfile

    with tarfile.open(CIFAR10_ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    data = load_data(str(tmp_path / "cifar10"), max_train_images=1000)
    assert sizes(data) == (1000, 900, 5000, 10000)
    assert data.input_shape == (3, 32, 32)
    assert np.bincount(labels(data.test)).tolist() == [1000] * 10
