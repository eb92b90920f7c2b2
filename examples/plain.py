"""Prune a plain PyTorch model of one's own to half of its MACs: ten lines of psenet.

    python examples/plain.py
    python examples/plain.py --data FOLDER
    python examples/plain.py --tiny

The data is scikit-learn's handwritten digits, which come with it, or a folder of images `{train,val,test}/<class>/*`.
"""

from collections.abc import Sequence

import torch
from torch import nn

import psenet
import shown
from psenet.data import load_data, make_loader


class Net(nn.Module):
    """Three convolutions and a shortcut, as anyone might write them."""

    def __init__(self, in_channels: int, num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.third = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (width, width, 2 * width))
        self.classifier = nn.Linear(2 * width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (B, classes)."""
        y = self.norms[0](self.first(x)).relu()
        y = y + self.norms[1](self.second(y)).relu()
        return self.classifier(self.norms[2](self.third(y)).relu().mean((2, 3)))


def main(argv: Sequence[str] | None = None) -> shown.Shown:
    """Train, prune, fine-tune and compare."""
    arguments = shown.parse(shown.parser(__doc__, name="plain", epochs=15, data="digits"), argv, tiny_epochs=12)
    torch.manual_seed(arguments.seed)
    data = load_data(arguments.data, seed=arguments.seed, max_train_images=200 if arguments.tiny else None)
    model = Net(data.input_shape[0], data.num_classes, width=16 if arguments.tiny else 32)
    # Ten lines; all else is the user's own, or told to people.
    training = psenet.TrainConfig(epochs=arguments.epochs)
    tuning = psenet.TrainConfig(epochs=arguments.finetune_epochs, learning_rate=0.02, distill_weight=0.5)
    result = psenet.prune(
        model,
        torch.zeros(1, *data.input_shape),
        make_loader(data.train, batch_size=64, shuffle=True),  # or a DataLoader of your own, of (image, label) batches
        make_loader(data.validation, batch_size=64, shuffle=False),
        test_loader=make_loader(data.test, batch_size=64, shuffle=False),
        budget=psenet.Budget(macs="50%"),
        config=psenet.PruneConfig(
            baseline=training,
            supernet=training,
            finetune=tuning,
            num_evaluations=arguments.evaluations,
            divisor=4,
            seed=arguments.seed,
        ),
        out=arguments.out,
        resume=True,  # the same command again goes on where it was interrupted
        description={"model": "plain net", "data": data.name},
        say=print,
    )
    return shown.show(result, "plain", arguments, argv)


if __name__ == "__main__":
    main()
