"""Predict the latency of any subnet from some hundred measured ones, where the net will run.

The prediction is a sum of parts that grow with the widths (MACs of a layer, its channels, parameters), each times a
non-negative number of milliseconds, so that more channels never take less predicted time: what search relies on when
it repairs settings. See `psenet.latency_fit` for the fit.

Legend: N settings, G channel groups, P parts.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import overload

import numpy as np
import torch
from torch import nn

from psenet.cost import LatencyCost
from psenet.errors import InputError
from psenet.history import read_arrays, write_arrays
from psenet.inputs import Inputs
from psenet.latency import time_passes
from psenet.latency_fit import choose, feature_sets, latency_parts, left_out_errors, weights
from psenet.runners import EAGER, Runner
from psenet.space import WidthSpace
from psenet.supernet import Supernet
from psenet.widths import Widths

NUM_SUBNETS = {"eager": 120, "onnxruntime": 40, "compile": 24}
"""Subnets measured by default: an export takes a second or more, compiling half a minute."""
_LEAST_SUBNETS = 10
_WARMUP = 2
_LEAST_RUNS, _MOST_RUNS, _WANTED_MS = 7, 25, 100.0
_DRAWS_EACH = 20
"""Draws for each setting wanted before fewer settings are taken to be all there are."""
_KIND, _FORMAT = "latency model", 1


class LatencyModel:
    """Latency as a formula of the widths. Immutable; made by `measure`, `fit` or `load`.

    `WidthSpace.with_latency` makes it a cost of a space, and so a limit of a `Budget`.

    Args:
        space: The width space.
        weight_P: Milliseconds for one unit of each part, none negative, shape (P,).
        widths_NG: The settings that were measured, int64 of shape (N, G).
        latency_N: What they took in milliseconds, shape (N,).
        errors_N: Relative error at each of them of a model that was fitted without it, shape (N,).
        runner: What ran them.
        features: How the parts are tied together.
        full_macs: MACs of the full model; those of `space` if None. They tell input sizes apart.
    """

    def __init__(
        self,
        space: WidthSpace,
        weight_P: np.ndarray,
        *,
        widths_NG: np.ndarray,
        latency_N: np.ndarray,
        errors_N: np.ndarray,
        runner: Runner,
        features: str,
        full_macs: int | None = None,
    ) -> None:
        self.space_digest = space.digest()
        self.runner, self.features = runner, features
        self.widths_NG, self.latency_N, self.errors_N = widths_NG, latency_N, errors_N
        self._weight_P = weight_P
        self._full_macs = space.macs(space.full()) if full_macs is None else full_macs
        self._space = space.with_latency(self)

    def __repr__(self) -> str:
        return f"LatencyModel({self.describe()})"

    @property
    def cv_error(self) -> float:
        """The median relative error at settings that were left out when fitting (cross-validation); 0.05 is 5 %.

        The noise of the measurements is in it: on a machine that others use, predictions are better than it says.
        """
        return float(np.median(self.errors_N))

    @property
    def cv_max_error(self) -> float:
        """The largest of these errors."""
        return float(np.max(self.errors_N))

    def describe(self) -> str:
        """Return what was measured and how well it predicts, for a person."""
        runner, full_ms = self.runner, self.predict(self._space.full())
        threads = "" if runner.num_threads is None else f", threads {runner.num_threads}"
        return (
            f"full model {full_ms:.4g} ms by {runner.engine} on {runner.device}{threads}, batch {runner.batch_size}; "
            f"fitted to {len(self.latency_N)} subnets by {self.features}; error at subnets left out: median "
            f"{self.cv_error:.1%}, largest {self.cv_max_error:.1%}"
        )

    # Making -------------------------------------------------------------------------------------------------------

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        space: WidthSpace,
        example_input: Inputs,
        *,
        runner: Runner = EAGER,
        num_subnets: int | None = None,
        num_runs: int | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> "LatencyModel":
        """Measure subnets on this machine and fit a model to them.

        Every subnet takes turns with the full model, and its latency is the ratio of the two (of their lower
        quartiles) times the full model's median over all: what slows the machine down for a while cancels out. One
        subnet is held at a time.

        Args:
            model: The model that the space was traced from; unchanged.
            space: Its width space.
            example_input: One sample, shape (1, ...), or a tuple of the model's arguments, as traced.
            runner: The engine, device, threads and batch size.
            num_subnets: How many to measure, at least 10; None: as many as `NUM_SUBNETS` says for the engine. All
                settings where the space has fewer.
            num_runs: Measurements of each subnet, at least 3; None: those in which the full model runs a tenth of a
                second, at least 7 and at most 25.
            seed: Seed of the choice of subnets.
            progress: Called after every subnet with how many are done and how many there are.

        Raises:
            InputError: The engine or device cannot run the model, or a number is too small.
        """
        wanted = NUM_SUBNETS[runner.engine] if num_subnets is None else num_subnets
        if wanted < _LEAST_SUBNETS:
            raise InputError(f"num_subnets must be at least {_LEAST_SUBNETS}; got {wanted}")
        runner.check()
        settings = spread_settings(space, wanted, np.random.default_rng(seed))
        latency_N = _measure_beside_full(
            Supernet(model, space), settings, example_input, runner=runner, num_runs=num_runs, progress=progress
        )
        known = replace(runner, num_threads=runner.num_threads or torch.get_num_threads())
        return cls.fit(space, settings, latency_N, runner=known, seed=seed)

    @classmethod
    def fit(
        cls,
        space: WidthSpace,
        widths: Sequence[Widths] | np.ndarray,
        latency_ms: Sequence[float] | np.ndarray,
        *,
        runner: Runner = EAGER,
        seed: int = 0,
    ) -> "LatencyModel":
        """Fit a model to measured latencies, such as a device's own tools give.

        Args:
            space: The width space.
            widths: The settings that were measured, at least two, also as an array of shape (N, G).
            latency_ms: What each took, in milliseconds.
            runner: What ran them, for the record.
            seed: Seed of the division into folds.

        Raises:
            InputError: There is not one latency above 0 for each setting, there are fewer than two, or widths are not
                of this space.
        """
        settings = space.from_array(widths) if isinstance(widths, np.ndarray) else widths
        latency_N = np.asarray(latency_ms, dtype=np.float64)
        if latency_N.shape != (len(settings),) or len(settings) < 2:
            raise InputError(
                f"a latency model needs one latency for each of at least two settings; got {len(settings)} settings "
                f"and latencies of shape {latency_N.shape}"
            )
        if not (np.isfinite(latency_N).all() and (latency_N > 0).all()):
            raise InputError("latencies must be finite and above 0; some are not")
        sets = feature_sets(space.costs)
        units_NG = np.array([space.units(setting) for setting in settings], dtype=np.float64)
        parts_NP = latency_parts(space.costs).by_term(units_NG)
        rng = np.random.default_rng(seed)
        name = choose(parts_NP, latency_N, sets, rng)
        return cls(
            space,
            weights(parts_NP, latency_N, sets[name]),
            widths_NG=space.to_array(settings),
            latency_N=latency_N,
            errors_N=left_out_errors(parts_NP, latency_N, sets, rng),
            runner=runner,
            features=name,
        )

    # Using --------------------------------------------------------------------------------------------------------

    @overload
    def predict(self, widths: Widths) -> float: ...
    @overload
    def predict(self, widths: Sequence[Widths] | np.ndarray) -> np.ndarray: ...
    def predict(self, widths: Widths | Sequence[Widths] | np.ndarray) -> float | np.ndarray:
        """Return predicted milliseconds: a float for one setting, float64 of shape (N,) for several or an (N, G) array.

        Raises:
            InputError: Widths are not of this space.
        """
        return self._space.latency_ms(widths)

    def cost(self, space: WidthSpace) -> LatencyCost:
        """Return the formula of the latency for the space that was measured.

        Raises:
            InputError: The model was measured on another space, or at another input size.
        """
        if space.digest() != self.space_digest:
            raise InputError(
                f"this latency model was measured on another width space ({self.space_digest}, here {space.digest()}): "
                "the model, divisor or choices differ; measure it on this one"
            )
        macs = space.macs(space.full())
        if macs != self._full_macs:
            raise InputError(
                f"this latency model was measured on a model of {self._full_macs} MACs; it has {macs} here: the input "
                "size differs; measure it at this one"
            )
        return LatencyCost(latency_parts(space.costs), self._weight_P)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model as an .npz file; a kill leaves the old file or the new one."""
        arrays = {
            "weights": self._weight_P,
            "widths": self.widths_NG,
            "latency_ms": self.latency_N,
            "errors": self.errors_N,
            "full_macs": np.array(self._full_macs),
            "features": np.array(self.features),
            "runner": np.array(json.dumps(asdict(self.runner))),
        }
        write_arrays(path, arrays, space_digest=self.space_digest, kind=_KIND, version=_FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str], space: WidthSpace) -> "LatencyModel":
        """Read a model that `save` wrote.

        Raises:
            InputError: The file is missing or corrupt, or belongs to another space or input size.
        """
        arrays = read_arrays(path, space_digest=space.digest(), kind=_KIND, version=_FORMAT)
        _check_arrays(arrays, space, path)
        return cls(
            space,
            arrays["weights"],
            widths_NG=arrays["widths"],
            latency_N=arrays["latency_ms"],
            errors_N=arrays["errors"],
            runner=Runner(**json.loads(str(arrays["runner"]))),
            features=str(arrays["features"]),
            full_macs=int(arrays["full_macs"]),
        )


def spread_settings(space: WidthSpace, num: int, rng: np.random.Generator) -> list[Widths]:
    """Return different settings from the smallest to the full one: these two and others, half of them uniform draws.

    Uniform draws all cost about the same, so the other half is drawn around scales between the ends.

    Args:
        space: The width space.
        num: How many; fewer only if the space has fewer, or nearly.
        rng: Source of randomness.
    """
    found = dict.fromkeys([space.full(), space.smallest()])
    for attempt in range(_DRAWS_EACH * num):
        if len(found) >= num:
            break
        found.setdefault(_scaled(space, rng) if attempt % 2 else space.sample(rng))
    return list(found)[:num]


def _scaled(space: WidthSpace, rng: np.random.Generator) -> Widths:
    around = rng.random()
    shares = np.clip(around + rng.uniform(-0.3, 0.3, len(space.groups)), 0, 1).tolist()
    return Widths(
        {
            group.name: group.choices[round(share * (len(group.choices) - 1))]
            for group, share in zip(space.groups, shares, strict=True)
        }
    )


def _measure_beside_full(
    supernet: Supernet,
    settings: Sequence[Widths],
    example_input: Inputs,
    *,
    runner: Runner,
    num_runs: int | None,
    progress: Callable[[int, int], None] | None,
) -> np.ndarray:
    """Return the latency of each setting in milliseconds, shape (N,)."""
    ratios, full_ms = [], []
    full = supernet.extract(supernet.space.full()).to(runner.place)
    with runner.prepare(full, example_input) as run_full:
        if num_runs is None:
            alone_ms = time_passes({"full": run_full}, runner, num_runs=3, warmup=_WARMUP)["full"].median_ms
            num_runs = round(min(max(_WANTED_MS / max(alone_ms, 1.0), _LEAST_RUNS), _MOST_RUNS))
        for number, widths in enumerate(settings, 1):
            net = supernet.extract(widths).to(runner.place)
            with runner.prepare(net, example_input) as run_net:
                passes = {"full": run_full, "subnet": run_net}
                times = time_passes(passes, runner, num_runs=num_runs, warmup=_WARMUP)
            # Other programs only ever add time, and on a busy machine the median of a few runs has much of it.
            ratios.append(times["subnet"].q1_ms / times["full"].q1_ms)
            full_ms.append(times["full"].median_ms)
            if progress is not None:
                progress(number, len(settings))
    return np.array(ratios) * float(np.median(full_ms))


def _check_arrays(arrays: dict[str, np.ndarray], space: WidthSpace, path: str | os.PathLike[str]) -> None:
    shapes = {
        "weights": (len(latency_parts(space.costs).terms),),
        "widths": (*arrays.get("latency_ms", np.zeros(0)).shape, len(space.groups)),
        "errors": arrays.get("latency_ms", np.zeros(0)).shape,
        **dict.fromkeys(("full_macs", "features", "runner"), ()),
    }
    wrong = [name for name in ("latency_ms", *shapes) if name not in arrays]
    wrong += [name for name, shape in shapes.items() if name in arrays and arrays[name].shape != shape]
    if wrong:
        raise InputError(f"the latency model {os.fspath(path)!r} is damaged: {', '.join(wrong)}; measure it again")
