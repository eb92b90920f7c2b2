"""Prune a model of timm to half of its MACs, on a folder of images.

    python examples/timm_model.py --data .data/cifar10 --max-train-images 3000
    python examples/timm_model.py --data FOLDER --model resnet18 --image-size 224
    python examples/timm_model.py --tiny

The data is a folder `{train,val,test}/<class>/*`, `{train,test}/<class>/*` or `<class>/*`; what is missing is taken
from the training images. The model starts untrained here, for the example needs no network. Yours will more often be
trained: give `create_model` your checkpoint or `pretrained=True`, and `PruneConfig(trained=True)` if it is trained for
your classes already, so that no baseline is trained.
"""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

import psenet
import shown
from psenet.data import load_data, make_loader


def main(argv: Sequence[str] | None = None) -> shown.Shown:
    """Train, prune, fine-tune and compare."""
    options = shown.parser(__doc__, name="timm_model", epochs=12, data=".data/cifar10")
    options.add_argument("--model", default="resnet10t", help="as timm calls it; default: %(default)s")
    options.add_argument("--image-size", type=int, help="in pixels; default: derived from the images")
    options.add_argument("--max-train-images", type=int, help="use only so many; default: all")
    arguments = shown.parse(options, argv)
    torch.manual_seed(arguments.seed)
    num_classes, name = 3, "made-up colours"
    if arguments.tiny:
        train, val, test = made_up(num_classes)
    else:
        (train, val, test), num_classes, name = read(arguments)
    model = timm.create_model(arguments.model, num_classes=num_classes)
    training = psenet.TrainConfig(epochs=arguments.epochs, label_smoothing=0.1)
    tuning = psenet.TrainConfig(epochs=arguments.finetune_epochs, learning_rate=0.02, distill_weight=0.5)
    result = psenet.prune(
        model,
        train.dataset[0][0].unsqueeze(0),
        train,
        val,
        test_loader=test,
        budget=psenet.Budget(macs="50%"),
        config=psenet.PruneConfig(
            baseline=training,
            supernet=training,
            finetune=tuning,
            num_evaluations=arguments.evaluations,
            seed=arguments.seed,
        ),
        out=arguments.out,
        resume=True,  # the same command again goes on where it was interrupted
        description={"model": f"timm:{arguments.model}", "data": name},
        say=print,
    )
    return shown.show(result, "timm_model", arguments, argv)


def read(arguments: Any) -> tuple[list[DataLoader], int, str]:
    """Return the loaders of a folder's three parts, the number of classes, and what was read."""
    shown.folder_of(arguments, ".")
    data = load_data(
        arguments.data,
        image_size=arguments.image_size,
        max_train_images=arguments.max_train_images,
        seed=arguments.seed,
    )
    # Every candidate is scored on these, so a thousand will do; they are sorted by class, so every so many-th is taken.
    step = max(1, len(data.validation) // 1000)  # pyright: ignore[reportArgumentType]
    validation = Subset(data.validation, range(0, len(data.validation), step))  # pyright: ignore[reportArgumentType]
    loaders: list[DataLoader] = [
        make_loader(part, batch_size=64, shuffle=part is data.train) for part in (data.train, validation, data.test)
    ]
    pixels = "x".join(map(str, data.input_shape[1:]))
    return loaders, data.num_classes, f"{len(loaders[0].dataset)} images of {pixels} pixels"  # pyright: ignore[reportArgumentType]


def made_up(num_classes: int) -> list[DataLoader]:
    """Return loaders of noise in which one colour is stronger."""
    torch.manual_seed(0)
    loaders = []
    for count in (96, 48, 48):
        labels = torch.arange(count) % num_classes
        images = torch.randn(count, 3, 32, 32) + 0.5 * torch.eye(3)[labels][:, :, None, None]
        loaders.append(DataLoader(TensorDataset(images, labels), 24, shuffle=not loaders))
    return loaders


if __name__ == "__main__":
    main()
