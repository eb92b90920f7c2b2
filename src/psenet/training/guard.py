"""The guard of a training: stops it when its numbers are not finite, and says where they broke."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from psenet import ranks

_IN_THE_LOSS = "weights, images and the outputs of all layers are finite, the loss of them is not"


class TrainingDivergedError(RuntimeError):
    """The loss or the weights became NaN or infinite."""


class Guard:
    """Stops a training whose numbers are not finite.

    Args:
        module: What is trained.
        run_again: Runs the forward pass of a step on a batch once more.
        checkpoint: Where the last good state is, to say so.
        explain: Says more about a loss that is not finite, such as which subnet had it first; or nothing.
    """

    def __init__(
        self,
        module: nn.Module,
        run_again: Callable[[Any, int], object],
        *,
        checkpoint: Path | None,
        explain: Callable[[], str] | None = None,
    ) -> None:
        self._module = module
        self._run_again = run_again
        self._checkpoint = checkpoint
        self._explain = explain

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
        """Stop if weights are not finite: a last update can break them after a finite loss.

        Raises:
            TrainingDivergedError: They are not; such a state must not become the checkpoint.
        """
        broken = _broken_weights(self._module)
        if broken:
            self._stop(f"{len(broken)} weights are not finite after step {number}, {broken[0]} first")

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
        raise TrainingDivergedError(f"{what}: lower the learning rate or check the data; {kept}")


def _broken_weights(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if not bool(parameter.isfinite().all())]


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
