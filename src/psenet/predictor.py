"""The predictor: a guess at the score of subnets that nobody has scored, with its uncertainty.

Two regressions, one on top of the other. The first learns from training: which widths made a loss better or worse than
was to be expected at that step and that cost. The second learns from scored candidates how much of that, of cost and of
every single width their scores show; few candidates suffice, because the first one has done most of the work.

Legend: N settings, G channel groups, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from psenet.history import History
from psenet.prior import finite_scores, loss_residuals
from psenet.space import WidthSpace
from psenet.widths import Widths

LEAST_SCORES = 4
"""Scored candidates below which only training's losses are asked."""
_TRUST = 3.0
"""Scale of what training says and of cost beside that of single widths: the larger, the less a ridge shrinks it."""


@dataclass(frozen=True)
class Predictor:
    """Scores of unseen subnets. Immutable; made by `untrained` or `fit`, and improved by `updated`."""

    space: WidthSpace
    effects: np.ndarray
    """By how much the features lower a loss, shape (F,); zeros where no training was seen."""
    scores: Any = None
    """The regression of the scored candidates, a scikit-learn `BayesianRidge`; None while there are too few."""

    @classmethod
    def untrained(cls, space: WidthSpace) -> "Predictor":
        """Return a predictor that has seen no training: it knows what scored candidates tell it."""
        return cls(space, np.zeros(2 * len(space.groups)))

    @classmethod
    def fit(cls, history: History, space: WidthSpace) -> "Predictor":
        """Learn from the losses that training saw, less the trend of training and the effect of cost.

        Raises:
            InputError: The history is of another space.
        """
        from sklearn.linear_model import BayesianRidge

        widths_NG, residual_N, weight_N = loss_residuals(history, space)
        if len(residual_N) < 2 or not space.groups:
            return cls.untrained(space)
        model = BayesianRidge().fit(_features(space, widths_NG), -residual_N, sample_weight=weight_N)
        return cls(space, np.asarray(model.coef_))

    def updated(self, widths: Sequence[Widths] | np.ndarray, scores: Sequence[float]) -> "Predictor":
        """Return a predictor that knows the scores of these candidates, and of no others.

        Args:
            widths: The candidates, or their widths as an array of shape (N, G).
            scores: Their scores, higher is better; those not finite are left out.

        Raises:
            InputError: There is not one score for each candidate.
        """
        from sklearn import config_context
        from sklearn.linear_model import BayesianRidge

        widths_NG, scores_N = finite_scores(self.space, widths, scores)
        if len(scores_N) < LEAST_SCORES or np.ptp(scores_N) == 0:
            return replace(self, scores=None)
        # The features are finite by construction, and a search fits once a candidate.
        with config_context(assume_finite=True, skip_parameter_validation=True):
            return replace(self, scores=BayesianRidge().fit(self._all_features(widths_NG), scores_N))

    def predict(self, widths: Sequence[Widths] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the expected scores of settings and their standard deviations, each float64 of shape (N,).

        Before there are enough scored candidates, what training says: on the scale of losses, the sign turned, and
        without uncertainty.
        """
        widths_NG = widths if isinstance(widths, np.ndarray) else self.space.to_array(widths)
        if self.scores is None:
            return _features(self.space, widths_NG) @ self.effects, np.zeros(len(widths_NG))
        # What `BayesianRidge.predict` does, without its checks, which take longer than the sums.
        features_NF = self._all_features(widths_NG)
        centred_NF = features_NF - self.scores.X_offset_
        variance_N = ((centred_NF @ self.scores.sigma_) * centred_NF).sum(axis=1) + 1 / self.scores.alpha_
        return features_NF @ self.scores.coef_ + self.scores.intercept_, np.sqrt(variance_N)

    @property
    def knows_something(self) -> bool:
        """Whether predictions tell settings apart."""
        return self.scores is not None or bool(self.effects.any())

    def _all_features(self, widths_NG: np.ndarray) -> np.ndarray:
        features_NF = _features(self.space, widths_NG)
        scale = float(np.linalg.norm(self.effects)) / np.sqrt(max(1, len(self.effects)))
        said_N = features_NF @ self.effects / scale if scale > 0 else np.zeros(len(features_NF))
        log_macs_N = np.log(self.space.macs(widths_NG) / self.space.macs(self.space.full()))
        singles_NF = features_NF / np.sqrt(max(1, len(self.space.groups)))
        return np.column_stack([_TRUST * said_N, _TRUST * log_macs_N, singles_NF])


def _features(space: WidthSpace, widths_NG: np.ndarray) -> np.ndarray:
    """Return the share of its channels that each group keeps, and its logarithm, shape (N, 2 G)."""
    share_NG = widths_NG / np.array([group.size for group in space.groups], dtype=np.float64)
    return np.concatenate([share_NG, np.log(share_NG)], axis=1)
