"""The record of every subnet that training visited: (step, widths, loss).

Legend: N visits, G channel groups.
"""

import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from psenet.errors import InputError
from psenet.files import write_atomically
from psenet.space import WidthSpace
from psenet.widths import Widths

_FORMAT = 1


class History:
    """Steps, widths and losses of the subnets that training visited, in order.

    Losses stay on their device until somebody reads them, and are then fetched all at once: appending costs no
    synchronisation with a GPU.

    Args:
        space: The width space the visited subnets belong to.

    Example:
        >>> history = History(space)  # doctest: +SKIP
        >>> history.append(0, [space.full(), space.smallest()], torch.tensor([2.1, 2.4]))  # doctest: +SKIP
    """

    def __init__(self, space: WidthSpace) -> None:
        self.space_digest = space.digest()
        self._space = space
        self._steps_N = np.zeros(0, dtype=np.int64)
        self._widths_NG = np.zeros((0, len(space.groups)), dtype=np.int64)
        self._losses_N = np.zeros(0, dtype=np.float64)
        self._pending: list[tuple[int, list[Widths], torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self._steps_N) + sum(len(widths) for _, widths, _ in self._pending)

    def __repr__(self) -> str:
        return f"History({len(self)} visits)"

    def append(self, step: int, widths: Sequence[Widths], losses: torch.Tensor) -> None:
        """Record one training step.

        Args:
            step: Number of the step, from 0, over the whole training.
            widths: The subnets the step trained.
            losses: Their losses, shape (len(widths),), on any device; may carry a graph.

        Raises:
            TypeError: `losses` is not a tensor.
            InputError: There is not exactly one loss for each subnet.
        """
        if not isinstance(losses, torch.Tensor):
            raise TypeError(f"losses must be a tensor; got {type(losses).__name__}")
        if losses.shape != (len(widths),):
            raise InputError(f"expected losses of shape ({len(widths)},), one a subnet; got {tuple(losses.shape)}")
        # clone: the caller may reuse the tensor's memory (CUDA graphs do).
        self._pending.append((int(step), list(widths), losses.detach().clone()))

    @property
    def steps(self) -> np.ndarray:
        """The step of each visit, int64 of shape (N,)."""
        self._settle()
        return self._steps_N

    @property
    def widths(self) -> np.ndarray:
        """The widths of each visit, int64 of shape (N, G), groups in the order of the space."""
        self._settle()
        return self._widths_NG

    @property
    def losses(self) -> np.ndarray:
        """The loss of each visit, float64 of shape (N,); NaN where training saw NaN."""
        self._settle()
        return self._losses_N

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the record as plain tensors, for a checkpoint."""
        return {
            "steps": torch.from_numpy(self.steps.copy()),
            "widths": torch.from_numpy(self.widths.copy()),
            "losses": torch.from_numpy(self.losses.copy()),
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replace the record by one from `state_dict`.

        Raises:
            InputError: Parts are missing, or the shapes or widths are not of this space.
        """
        self._replace({name: tensor.cpu().numpy() for name, tensor in state.items()}, "the checkpoint's history")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record as an .npz file; a kill leaves the old file or the new one."""
        arrays = {"steps": self.steps, "widths": self.widths, "losses": self.losses}
        write_arrays(path, arrays, space_digest=self.space_digest, kind="history", version=_FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str], space: WidthSpace) -> "History":
        """Read a record that `save` wrote.

        Raises:
            InputError: The file is missing or corrupt, or belongs to another space.
        """
        arrays = read_arrays(path, space_digest=space.digest(), kind="history", version=_FORMAT)
        history = cls(space)
        history._replace(arrays, f"the history {str(path)!r}")
        return history

    def _replace(self, arrays: Mapping[str, np.ndarray], where: str) -> None:
        missing = [name for name in ("steps", "widths", "losses") if name not in arrays]
        if missing:
            raise InputError(f"{where} lacks {', '.join(missing)}; it is not a record of visits")
        steps_N, widths_NG, losses_N = (np.asarray(arrays[name]) for name in ("steps", "widths", "losses"))
        num_groups = len(self._space.groups)
        if steps_N.ndim != 1 or losses_N.shape != steps_N.shape or widths_NG.shape != (len(steps_N), num_groups):
            raise InputError(
                f"{where} must hold steps (N,), widths (N, {num_groups}) and losses (N,) of one N; "
                f"got {steps_N.shape}, {widths_NG.shape} and {losses_N.shape}"
            )
        for number, group in enumerate(self._space.groups):
            if not np.isin(widths_NG[:, number], group.choices).all():
                raise InputError(f"{where} holds widths of group {group.name!r} that are not its choices")
        self._pending = []
        self._steps_N = steps_N.astype(np.int64)
        self._widths_NG = widths_NG.astype(np.int64)
        self._losses_N = losses_N.astype(np.float64)

    def _settle(self) -> None:
        """Move pending visits into the arrays: one transfer for each device."""
        if not self._pending:
            return
        steps = np.concatenate([np.full(len(widths), step, dtype=np.int64) for step, widths, _ in self._pending])
        rows_NG = self._space.to_array([setting for _, widths, _ in self._pending for setting in widths])
        parts: list[np.ndarray] = [np.zeros(0)] * len(self._pending)
        for device in {losses.device for _, _, losses in self._pending}:
            numbers = [number for number, (_, _, losses) in enumerate(self._pending) if losses.device == device]
            # Widened after the transfer: not every device has float64.
            joined = torch.cat([self._pending[number][2] for number in numbers]).cpu().double().numpy()
            ends = np.cumsum([len(self._pending[number][1]) for number in numbers])[:-1]
            for number, part in zip(numbers, np.split(joined, ends), strict=True):
                parts[number] = part
        self._steps_N = np.concatenate([self._steps_N, steps])
        self._widths_NG = np.concatenate([self._widths_NG, rows_NG])
        self._losses_N = np.concatenate([self._losses_N, *parts])
        self._pending = []


def write_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], *, space_digest: str, kind: str, version: int
) -> None:
    """Write arrays as an .npz file that says what it is and which space it belongs to."""
    write_atomically(
        path,
        lambda file: np.savez_compressed(
            file,
            kind=np.array(kind),
            version=np.array(version),
            space_digest=np.array(space_digest),
            **arrays,  # pyright: ignore[reportArgumentType] - an array may not be named allow_pickle; none is
        ),
    )


def read_arrays(path: str | os.PathLike[str], *, space_digest: str, kind: str, version: int) -> dict[str, np.ndarray]:
    """Read what `write_arrays` wrote.

    Raises:
        InputError: The file is missing, corrupt, of another kind or version, or belongs to another space.
    """
    place = f"the {kind} {str(Path(path))!r}"
    try:
        # Opened here, because numpy leaves a file open that turns out to be corrupt.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except FileNotFoundError:
        raise InputError(f"{place} does not exist") from None
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        # numpy's own words advise to unpickle it all the same.
        reason = "it holds objects, which are never unpickled" if "pickle" in str(error) else error
        raise InputError(f"{place} cannot be read; it is corrupt or no .npz file: {reason}") from None
    found = [str(arrays.pop(name, None)) for name in ("kind", "version", "space_digest")]
    if found[:2] != [kind, str(version)]:
        raise InputError(f"{place} must be a psenet {kind} of version {version}; got {found[0]} of version {found[1]}")
    if found[2] != space_digest:
        raise InputError(
            f"{place} belongs to another width space ({found[2]}, here {space_digest}): "
            "the model, divisor or choices differ; use the file made with this space"
        )
    return arrays
