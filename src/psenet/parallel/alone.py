"""Layers that the parallel pass runs subnet by subnet.

A layer that computes its weights from a parameter (standardised, normalised by their length) computes others for fewer
channels, so there is no one weight from which n subnets could drop their parts. Each subnet runs the narrow layer on
its own samples and kept channels; what it gives is spread over the channels of the ceiling, zero elsewhere. That is n
small layers in place of one large one, with fewer MACs in all.

Legend: n subnets, B batch, C channels at the ceiling.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.func import functional_call

from psenet.slicing import narrow_module, slice_state
from psenet.space import WidthSpace
from psenet.widths import Widths


class AloneLayer:
    """One layer of the model, in its narrow forms.

    Args:
        model: The full-width module.
        space: Its width space.
        path: The layer.
        axis: The channel axis of what it takes and gives.
    """

    def __init__(self, model: nn.Module, space: WidthSpace, path: str, axis: int) -> None:
        self._full = model.get_submodule(path)
        self._space = space
        self._axis = axis
        self._names = {f"{path}.{name}": name for name, _ in self._full.named_parameters()}
        self._names |= {f"{path}.{name}": name for name, _ in self._full.named_buffers()}
        self._forms: dict[tuple[tuple[int, ...], ...], nn.Module] = {}
        self._runs: list[Callable[[torch.Tensor], torch.Tensor]] = []

    def prepare(
        self, state: Mapping[str, torch.Tensor], widths: Sequence[Widths], in_nC: torch.Tensor, out_nC: torch.Tensor
    ) -> None:
        """Take the weights of a step.

        Args:
            state: The full-width parameters and buffers.
            widths: The n subnets.
            in_nC: True where a subnet keeps an input channel, shape (n, C).
            out_nC: The same for the output.
        """
        self._runs = [
            self._run_of(state, setting, kept_in.nonzero().flatten(), kept_out)
            for setting, kept_in, kept_out in zip(widths, in_nC, out_nC, strict=True)
        ]

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """Run the layer on its one input, sample j for subnet j mod n."""
        (x,) = (*args, *kwargs.values())
        n = len(self._runs)
        outputs = [run(x[number::n]) for number, run in enumerate(self._runs)]
        return torch.stack(outputs, dim=1).flatten(0, 1)

    def _run_of(
        self, state: Mapping[str, torch.Tensor], widths: Widths, kept_in: torch.Tensor, kept_out: torch.Tensor
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        slices = slice_state(state, self._space, widths, names=self._names)
        tensors = {local: slices[name] for name, local in self._names.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        key = tuple(shapes.values())
        if key not in self._forms:
            self._forms[key] = narrow_module(self._full, shapes, device="meta")
        form = self._forms[key]
        places = kept_out.nonzero().flatten()

        def run(x: torch.Tensor) -> torch.Tensor:
            form.train(self._full.training)
            out = functional_call(form, tensors, (x.index_select(self._axis, kept_in),), tie_weights=False)
            shape = list(out.shape)
            shape[self._axis] = len(kept_out)
            return out.new_zeros(shape).index_copy(self._axis, places, out)

        return run
