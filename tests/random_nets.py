"""Random small networks: any graph of convolutions, norms, cuts, sums and gates, from a seed alone.

`RandomNet(seed)` runs parts one after the other; each reads the results of earlier ones. Its `repr` says which, so that
a seed that fails can be read. `tests/parts.py` has the parts; all of them keep the samples on axis 0.
"""

import random
from dataclasses import dataclass

import torch
from torch import nn

import parts

INPUT_SIDE = 8
NUM_CLASSES = 3


@dataclass(frozen=True)
class Feature:
    """A result that later parts can read: its number, and its shape (B, channels, side, side)."""

    number: int
    channels: int
    side: int


class RandomNet(nn.Module):
    """One network; the same seed always makes the same.

    Attributes:
        parts: The modules, in the order of their making.
        steps: What runs, in order: a part's number as text, and the numbers of the results that it reads; 0 is the
            input.
        outputs: The numbers of the results that are returned.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.title = f"seed {seed}"
        self.parts = nn.ModuleList()
        self.steps: list[tuple[str, tuple[int, ...]]] = []
        rng = random.Random(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.in_channels = rng.choice([1, 3, 3, 3, 4])
            self.outputs = tuple(_Draft(self, rng).finish())
        _randomise(self, seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Map (B, in_channels, side, side) to the scores of one head or several."""
        results = [x]
        for part, sources in self.steps:
            results.append(self.parts[int(part)](*(results[source] for source in sources)))
        outputs = [results[number] for number in self.outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def extra_repr(self) -> str:
        """Say the seed and the graph."""
        lines = [f"{number} = parts.{part}{sources}" for number, (part, sources) in enumerate(self.steps, 1)]
        return f"{self.title}; {'; '.join(lines)}; returns {self.outputs}"

    def batch(self, size: int) -> torch.Tensor:
        """Return float64 samples from torch's global generator."""
        return torch.randn(size, self.in_channels, INPUT_SIDE, INPUT_SIDE, dtype=torch.float64)


class _Draft:
    """Grows a network part by part, minding the shapes."""

    def __init__(self, net: RandomNet, rng: random.Random) -> None:
        self._net = net
        self._rng = rng
        self._features = [Feature(0, net.in_channels, INPUT_SIDE)]
        self._read: set[int] = set()
        channels = self._channels()
        self._run(parts.conv_norm(rng, net.in_channels, channels), [self._features[0]], channels, INPUT_SIDE)
        for _ in range(rng.randint(3, 8)):
            rng.choices([self._one, self._two, self._branches, self._again], [6, 3, 1.5, 1])[0]()

    def finish(self) -> list[int]:
        """Join what nothing has read yet and put heads on it; return the numbers of the outputs."""
        last = self._features[-1]
        loose = [f for f in self._features[1:-1] if f.number not in self._read]
        if loose:
            together = [last, *(self._resized(f, last.side) for f in loose)]
            last = self._run(parts.Op("cat"), together, sum(f.channels for f in together), last.side)
        heads = [last] if self._rng.random() < 0.8 else [last, self._pick()]
        return [
            self._run(parts.head(self._rng, f.channels, f.side, NUM_CLASSES), [f], NUM_CLASSES, 1).number for f in heads
        ]

    def _one(self, source: Feature | None = None) -> Feature:
        """Add a part that reads one result."""
        source = source or self._pick()
        for _ in range(20):
            make = self._rng.choices(list(parts.UNARY), list(parts.UNARY.values()))[0]
            made = make(self._rng, source.channels, source.side)
            if made is not None:
                return self._run(made.module, [source], made.channels, made.side)
        return source

    def _two(self) -> Feature:
        """Add a part that joins two results of one size."""
        a = self._pick()
        b = self._rng.choice([f for f in self._features if f.side == a.side])
        return self._join(a, b)

    def _branches(self) -> Feature:
        """Add two short branches from one result, and join their ends."""
        start = self._pick()
        a, b = start, start
        for _ in range(self._rng.randint(1, 2)):
            a = self._one(a)
        if self._rng.random() < 0.6:
            b = self._one(b)
        if a.side != b.side:
            small, large = sorted((a, b), key=lambda f: f.side)
            a, b = small, self._resized(large, small.side)
        return self._join(a, b)

    def _again(self) -> Feature:
        """Run a part that keeps its channels a second time, somewhere else; without one, make one."""
        source = self._pick()
        block = parts.conv_norm(self._rng, source.channels, source.channels)
        first = self._run(block, [source], source.channels, source.side)
        others = [f for f in self._features if f.channels == source.channels]
        other = self._rng.choice([first, *others])
        if self._rng.random() < 0.3:
            tied = parts.tied(self._rng, block, source.channels)
            return self._run(tied, [other], source.channels, other.side)
        return self._run(block, [other], source.channels, other.side)

    def _join(self, a: Feature, b: Feature) -> Feature:
        kind = self._rng.choices(list(parts.BINARY), list(parts.BINARY.values()))[0]
        if kind == "cat":
            return self._run(parts.Op("cat"), [a, b], a.channels + b.channels, a.side)
        if kind == "subtract" and a == b:  # nothing is left, and norms of nothing are rounding
            kind = "add"
        if a.channels != b.channels:
            b = self._run(parts.conv(self._rng, b.channels, a.channels, 1), [b], a.channels, b.side)
        return self._run(parts.Op(kind), [a, b], a.channels, a.side)

    def _resized(self, feature: Feature, side: int) -> Feature:
        if feature.side == side:
            return feature
        return self._run(nn.AdaptiveAvgPool2d(side), [feature], feature.channels, side)

    def _pick(self) -> Feature:
        return self._features[-1] if self._rng.random() < 0.7 else self._rng.choice(self._features[1:])

    def _channels(self) -> int:
        return self._rng.choice([8, 8, 12, 16, 16, 24])

    def _run(self, module: nn.Module, sources: list[Feature], channels: int, side: int) -> Feature:
        known = [number for number, part in enumerate(self._net.parts) if part is module]
        if not known:
            self._net.parts.append(module)
        part = str(known[0] if known else len(self._net.parts) - 1)
        self._net.steps.append((part, tuple(f.number for f in sources)))
        self._read |= {f.number for f in sources}
        self._features.append(Feature(len(self._net.steps), channels, side))
        return self._features[-1]


def _randomise(net: nn.Module, seed: int) -> None:
    """Make the net float64 and every vector in it random, so that no channel is dead and none like another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.double().state_dict().items():
            if tensor.is_floating_point() and tensor.numel() == max(tensor.shape, default=1):
                values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                positive = name.endswith(("weight", "var", "gain", "original0"))
                tensor.copy_(values * 0.5 + (0.75 if positive else -0.25))
