"""The guard of a training: stops it when its numbers are not finite, and says where they broke."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from psenet import ranks

_MOST_SKIPPED = 40
"""Steps left out in a row, each of which halves the factor by which gradients of half precision are scaled."""
_STATISTICS = ("running_mean", "running_var")
"""Buffers that a step changes. Others may be infinite on purpose, as masks are."""
_IN_THE_LOSS = "weights, images and the outputs of all layers are finite, the loss of them is not"


class TrainingDivergedError(RuntimeError):
    """The loss, the gradients or the weights became NaN or infinite."""


class Guard:
    """Stops a training whose numbers are not finite.

    Args:
        module: What is trained.
        run_again: Runs the forward pass of a step on a batch once more.
        checkpoint: Where the last good state is, to say so.
        explain: Says more about a loss that is not finite, such as which subnet had it first; or nothing.
        is_scaled: Whether gradients are scaled, as in fp16.
    """

    def __init__(
        self,
        module: nn.Module,
        run_again: Callable[[Any, int], object],
        *,
        checkpoint: Path | None,
        explain: Callable[[], str] | None = None,
        is_scaled: bool = False,
    ) -> None:
        self._module = module
        self._is_scaled = is_scaled
        self._run_again = run_again
        self._checkpoint = checkpoint
        self._explain = explain
        self._num_skipped = 0

    def check_loss(self, loss: torch.Tensor, batch: Any, number: int) -> None:
        """Stop if the loss of a step is not finite.

        Raises:
            TrainingDivergedError: It is not; with the step, and the layer where that begins.
        """
        if bool(torch.isfinite(loss).all()):
            return
        first = self._explain() if self._explain is not None else ""
        # The loss is the mean over all ranks, so all come here; the batch of one of them broke it.
        places = ranks.gather(self._where(batch, number))
        where = next((place for place in places if place != _IN_THE_LOSS), _IN_THE_LOSS)
        self._stop(f"the loss is {float(loss)} at step {number}{first} ({where})")

    def check_weights(self, number: int) -> None:
        """Stop if weights or running statistics are not finite: a last step can break them after a finite loss.

        Raises:
            TrainingDivergedError: They are not; such a state must not become the checkpoint.
        """
        broken = _broken_weights(self._module)
        if broken:
            self._stop(f"{len(broken)} weights are not finite after step {number}, {broken[0]} first")
        # Every rank has statistics of its own, and all must stop together.
        broken = next(filter(None, ranks.gather(_broken_statistics(self._module))), [])
        if broken:
            self._stop(f"{len(broken)} running statistics are not finite after step {number}, {broken[0]} first")

    def check_skipped(self, number: int, *, is_skipped: bool) -> None:
        """Stop if gradients are never finite, so that step after step is left out and nothing is learned.

        In fp16 a step whose gradients overflow is left out and the next one is scaled down: that is no divergence.

        Raises:
            TrainingDivergedError: So many steps in a row were left out that it is not the scale.
        """
        self._num_skipped = self._num_skipped + 1 if is_skipped else 0
        if self._num_skipped >= _MOST_SKIPPED:
            self._stop(f"the gradients of the last {_MOST_SKIPPED} steps, up to step {number}, are not finite")

    def _where(self, batch: Any, number: int) -> str:
        """Return where the numbers of a batch stop being finite."""
        broken = _broken_weights(self._module)
        if broken:
            return f"{len(broken)} weights are not finite, {broken[0]} first"
        if not _is_finite(batch):
            return "the batch itself has values that are not finite"
        layers = _layers_not_finite(self._module, lambda: self._run_again(batch, number))
        if layers:
            return f"weights and images are finite, the outputs of layer {layers[0]} are not"
        return _IN_THE_LOSS

    def _stop(self, what: str) -> NoReturn:
        kept = (
            f"the last good state is kept in {self._checkpoint}"
            if self._checkpoint is not None and self._checkpoint.exists()
            else "there is no checkpoint yet"
        )
        advice = "lower the learning rate or check the data"
        if self._is_scaled:
            advice += ", or take bf16, as fp16 ends at 65504"
        raise TrainingDivergedError(f"{what}: {advice}; {kept}")


def _broken_weights(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if not bool(parameter.isfinite().all())]


def _broken_statistics(module: nn.Module) -> list[str]:
    buffers = ((name, buffer) for name, buffer in module.named_buffers() if name.rpartition(".")[2] in _STATISTICS)
    return [name for name, buffer in buffers if not bool(buffer.isfinite().all())]


def _layers_not_finite(module: nn.Module, run: Callable[[], object]) -> list[str]:
    """Return the layers whose outputs are not finite, in the order in which they ran."""
    found: list[str] = []

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(part: nn.Module, inputs: Any, outputs: Any) -> None:
            if not _is_finite(outputs):
                found.append(name)

        return look

    leaves = [(name, part) for name, part in module.named_modules() if name and not any(part.children())]
    handles = [part.register_forward_hook(hook_of(name)) for name, part in leaves]
    try:
        with torch.no_grad():
            run()
    except Exception:
        # What it cannot run a second time it cannot explain; the error to tell of is the loss.
        return found
    finally:
        for handle in handles:
            handle.remove()
    return found


def _is_finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return all(map(_is_finite, value)) if isinstance(value, list | tuple) else True
