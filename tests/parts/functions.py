"""Functions of one result or several. Sizes that count channels are read from the input, as users write them."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = x.chunk(2, dim=1)
    return a, b


def _glu(x: torch.Tensor) -> torch.Tensor:
    a, b = _halves(x)
    return a * b.sigmoid()


def _swapped(x: torch.Tensor) -> torch.Tensor:
    a, b = _halves(x)
    return torch.cat([b, a], 1)


def _first_half(x: torch.Tensor) -> torch.Tensor:
    return x[:, : x.shape[1] // 2]


def _last_quarters(x: torch.Tensor) -> torch.Tensor:
    return x[:, x.shape[1] // 4 :]


def _shuffled(x: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = x.shape
    return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


def _maxout(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(1, (2, x.shape[1] // 2)).amax(1)


def _stacked(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x.tanh()], dim=1).sum(1)


def _selected(x: torch.Tensor) -> torch.Tensor:
    gates = torch.stack([x, x.neg()], dim=1).mean((3, 4), keepdim=True).softmax(1)
    return (torch.stack([x, x.tanh()], dim=1) * gates).sum(1)


def _spatially_gated(x: torch.Tensor) -> torch.Tensor:
    return x * x.mean(1, keepdim=True).sigmoid()


def _gated_by_largest(x: torch.Tensor) -> torch.Tensor:
    return x * (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)).tanh()


def _contrast(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean((2, 3), keepdim=True)


def _global_context(x: torch.Tensor) -> torch.Tensor:
    return x + x.mean((2, 3))[:, :, None, None].expand_as(x)


def _normalised_response(x: torch.Tensor) -> torch.Tensor:
    norm = x.norm(p=2, dim=(2, 3), keepdim=True)
    return x * (norm / (norm.mean(dim=1, keepdim=True) + 1e-2)) + x


def _in_place(x: torch.Tensor) -> torch.Tensor:
    y = x * 1.5
    y.add_(0.25).relu_()
    return y


def _every_second(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:, ::2], x[:, 1::2]], 1)


def _padded(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 0, 0, 0, 2, 2))


def _deviation(x: torch.Tensor) -> torch.Tensor:
    return x * x.std((2, 3), keepdim=True)


SAME: dict[str, Callable[..., torch.Tensor]] = {
    **{name: getattr(F, name) for name in ("relu", "gelu", "silu", "hardswish", "leaky_relu", "elu", "mish", "relu6")},
    **{"tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": F.softplus, "abs": torch.abs},
    "scaled": lambda x: x * 0.5,
    "shifted": lambda x: x + 0.5,
    "complement": lambda x: 1 - x,
    "clamped": lambda x: x.clamp(-1.0, 1.5),
    "half_sine": lambda x: x * x.sigmoid(),
    "magnitude": lambda x: (x.square() + 1).sqrt(),
    "transposed": lambda x: x.transpose(2, 3),
    "flipped": lambda x: x.flip(3),
    "there_and_back": lambda x: x.permute(0, 2, 3, 1).tanh().permute(0, 3, 1, 2),
    "flat": lambda x: x.flatten(2).tanh().view(x.shape[0], -1, x.shape[2], x.shape[3]),
    "unit_length": lambda x: F.normalize(x, dim=1),
    "stacked": _stacked,
    "selected": _selected,
    "spatially_gated": _spatially_gated,
    "gated_by_largest": _gated_by_largest,
    "contrast": _contrast,
    "global_context": _global_context,
    "normalised_response": _normalised_response,
    "in_place": _in_place,
}
HALVED = {"glu": _glu, "first_half": _first_half, "maxout": _maxout}
EVEN = {"swapped": _swapped, "shuffled": _shuffled, "every_second": _every_second}
UNKNOWN = {
    "softmax": lambda x: x.softmax(1),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "cumulative": lambda x: x.cumsum(1) * 0.1,
    "rolled": lambda x: x.roll(1, 1),
    "divided": lambda x: x / (1 + x.abs()),
}
"""Functions that freeze what they read."""
_JOINED: dict[str, Callable[..., torch.Tensor]] = {
    "cat": lambda *xs: torch.cat(xs, 1),
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b.tanh(),
    "gate": lambda a, b: a * b.mean((2, 3), keepdim=True).sigmoid(),
    "maximum": torch.maximum,
    "fused": lambda a, b: torch.addcmul(a, b, b.sigmoid()),
    "add_in_place": lambda a, b: (a * 1.0).add_(b),
    "stack": lambda a, b: torch.stack([a, b]).mean(0),
}
_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    **SAME,
    **HALVED,
    **EVEN,
    **UNKNOWN,
    **_JOINED,
    "concatenated_relu": lambda x: torch.cat([x.relu(), x.neg().relu()], 1),
    "last_quarters": _last_quarters,
    "padded": _padded,
    "deviation": _deviation,
}


class Op(nn.Module):
    """A function of one result or several, by name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        """Apply the function."""
        return _FUNCTIONS[self.name](*xs)

    def extra_repr(self) -> str:
        """Say the function's name."""
        return self.name
