"""Layers that the parallel pass runs subnet by subnet.

A layer that computes its weights from a parameter (standardised, normalised by their length) computes others for fewer
channels, so there is no one weight from which n subnets could drop their parts. Each subnet runs the narrow layer on
its own samples and kept channels; what it gives is spread over the channels of the ceiling, zero elsewhere. That is n
small layers in place of one large one, with fewer MACs in all.

Legend: n subnets, B batch, C channels at the ceiling.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.func import functional_call

from psenet.parallel.masks import Current
from psenet.slicing import State, narrow_module


class AloneLayer:
    """One layer of the model, in its narrow forms.

    Args:
        model: The full-width module.
        path: The layer.
        axis: The channel axis of what it takes and gives.
        current: Says which samples belong to which subnet.
    """

    def __init__(self, model: nn.Module, path: str, axis: int, current: Current) -> None:
        self._full = model.get_submodule(path)
        self._axis = axis
        self._current = current
        self.names = {
            f"{path}.{name}": name for name, _ in (*self._full.named_parameters(), *self._full.named_buffers())
        }
        """The layer's tensors: names in the model to names in the layer."""
        self._forms: dict[tuple[tuple[int, ...], ...], nn.Module] = {}
        self._runs: list[Callable[[torch.Tensor], torch.Tensor]] = []

    def prepare(self, slices: Sequence[State], in_nC: torch.Tensor, out_nC: torch.Tensor) -> None:
        """Take the weights of a step.

        Args:
            slices: What each of the n subnets keeps of the layer's tensors, by their names in the model.
            in_nC: True where a subnet keeps an input channel, shape (n, C).
            out_nC: The same for the output.
        """
        self._runs = [
            self._run_of({local: tensors[name] for name, local in self.names.items()}, kept_in, kept_out)
            for tensors, kept_in, kept_out in zip(slices, in_nC, out_nC, strict=True)
        ]

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """Run the layer on its one input, block by block."""
        (x,) = (*args, *kwargs.values())
        blocks = x.split(self._current.blocks.sizes)
        return torch.cat([run(block) for run, block in zip(self._runs, blocks, strict=True)])

    def _run_of(
        self, tensors: State, kept_in: torch.Tensor, kept_out: torch.Tensor
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        key = tuple(shapes.values())
        if key not in self._forms:
            self._forms[key] = narrow_module(self._full, shapes, device="meta")
        form = self._forms[key]
        taken, given = kept_in.nonzero().flatten(), kept_out.nonzero().flatten()

        def run(x: torch.Tensor) -> torch.Tensor:
            form.train(self._full.training)
            out = functional_call(form, tensors, (x.index_select(self._axis, taken),), tie_weights=False)
            shape = list(out.shape)
            shape[self._axis] = len(kept_out)
            return out.new_zeros(shape).index_copy(self._axis, given, out)

        return run
