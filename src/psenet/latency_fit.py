"""Fit latency as a sum of parts that grow with the widths, each times a non-negative number of milliseconds.

Few measurements cannot tell the parts of a hundred layers apart, so that parts are tied together in several ways
(`feature_sets`) and cross-validation chooses one. Squared relative errors are made least: a small net counts as much as
a large one.

Legend: N settings, P parts, F features (sums of parts that share a number), T layers with MACs.
"""

import numpy as np

from psenet.cost import LinearForm, ProductCost
from psenet.space import SpaceCosts

_NUM_FOLDS = 5
_ONE = LinearForm(1)


def latency_parts(costs: SpaceCosts) -> ProductCost:
    """Return what latency may grow with: MACs, input and output channels of each layer, parameters, and a constant."""
    macs, params = costs.macs.terms, costs.params.terms
    left = [(1, left, _ONE) for _, left, _ in macs]
    right = [(1, _ONE, right) for _, _, right in macs]
    return ProductCost([*macs, *left, *right, *params, (1, _ONE, _ONE)], costs.macs.num_groups)


def feature_sets(costs: SpaceCosts) -> dict[str, np.ndarray]:
    """Return ways to tie the parts together, the plainest first: by name, the parts in each feature, shape (F, P)."""
    scale_T = np.array([scale for scale, _, _ in costs.macs.terms], dtype=np.float64)
    # Depthwise layers and the like move as much data as others for far fewer MACs.
    thin_T = np.array([_ONE in (left, right) for _, left, right in costs.macs.terms], dtype=bool)
    num, num_params = len(scale_T), len(costs.params.terms)

    def feature(kind: int, values: np.ndarray) -> np.ndarray:
        """Return a row with values for the parts of one kind, in the order of `latency_parts`, shape (P,)."""
        kinds = [np.zeros(num), np.zeros(num), np.zeros(num), np.zeros(num_params), np.zeros(1)]
        kinds[kind] = values
        return np.concatenate(kinds)

    macs, constant = feature(0, np.ones(num)), feature(4, np.ones(1))
    kinds = [feature(0, thin_T.astype(np.float64)), feature(0, (~thin_T).astype(np.float64))]
    # The scale of a 1x1 convolution is its number of pixels, so that times channels it is the data read or written.
    traffic = [feature(1, scale_T), feature(2, scale_T), feature(3, np.ones(num_params))]
    layers = [feature(0, row) for row in np.eye(num)]
    channels = [feature(side, row) for side in (1, 2) for row in np.eye(num)]
    return {
        "MACs": np.stack([macs, constant]),
        "MACs by kind of layer, data and parameters": np.stack([*kinds, *traffic, constant]),
        "MACs of each layer": np.stack([*layers, *kinds, *traffic, constant]),
        "MACs and channels of each layer": np.stack([*layers, *channels, *kinds, *traffic, constant]),
    }


# Fitting --------------------------------------------------------------------------------------------------------------


def weights(parts_NP: np.ndarray, latency_N: np.ndarray, set_FP: np.ndarray) -> np.ndarray:
    """Return non-negative numbers of the parts that make the squared relative error least, shape (P,)."""
    from scipy.optimize import nnls

    features_NF = parts_NP @ set_FP.T
    size_F = features_NF.max(axis=0)
    used_F = np.flatnonzero(size_F > 0)
    scaled_NF = features_NF[:, used_F] / size_F[used_F]
    # Of features in the same proportion everywhere, one says it all.
    _, first = np.unique(np.round(scaled_NF, 12), axis=1, return_index=True)
    used_F, scaled_NF = used_F[first], scaled_NF[:, first]
    found_F, _ = nnls(scaled_NF / latency_N[:, None], np.ones(len(latency_N)), maxiter=100 * len(used_F))
    weight_F = np.zeros(len(set_FP))
    weight_F[used_F] = found_F / size_F[used_F]
    return weight_F @ set_FP


def choose(parts_NP: np.ndarray, latency_N: np.ndarray, sets: dict[str, np.ndarray], rng: np.random.Generator) -> str:
    """Return the name of the feature set whose mean relative error at settings left out is least."""
    if len(latency_N) < _NUM_FOLDS:
        return next(iter(sets))
    folds = _folds(len(latency_N), rng)

    def error(set_FP: np.ndarray) -> float:
        fitted = [weights(*_without(fold, parts_NP, latency_N), set_FP) for fold in folds]
        errors = [_errors(parts_NP, latency_N, *pair) for pair in zip(folds, fitted, strict=True)]
        return float(np.concatenate(errors).mean())

    return min(sets, key=lambda name: error(sets[name]))


def left_out_errors(
    parts_NP: np.ndarray, latency_N: np.ndarray, sets: dict[str, np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """Return the relative error at each setting of a model chosen and fitted without it, shape (N,)."""
    errors_N = np.zeros(len(latency_N))
    for fold in _folds(len(latency_N), rng):
        others = _without(fold, parts_NP, latency_N)
        name = choose(*others, sets, rng)
        errors_N[fold] = _errors(parts_NP, latency_N, fold, weights(*others, sets[name]))
    return errors_N


def _folds(num: int, rng: np.random.Generator) -> list[np.ndarray]:
    return np.array_split(rng.permutation(num), min(_NUM_FOLDS, num))


def _without(fold: np.ndarray, parts_NP: np.ndarray, latency_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.delete(parts_NP, fold, axis=0), np.delete(latency_N, fold)


def _errors(parts_NP: np.ndarray, latency_N: np.ndarray, fold: np.ndarray, weight_P: np.ndarray) -> np.ndarray:
    return np.abs(parts_NP[fold] @ weight_P / latency_N[fold] - 1)
