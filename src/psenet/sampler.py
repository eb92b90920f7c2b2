"""The search as an Optuna sampler: evolution seeded and mutated by a prior, always inside the budget.

Optuna is imported here at the top; import this module only where a search runs.

Legend: G channel groups, N settings, K children.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from psenet.budget import Limits
from psenet.predictor import Predictor
from psenet.prior import Prior
from psenet.proposal import Proposal
from psenet.space import WidthSpace
from psenet.tried import Inside, Tried
from psenet.widths import Widths

_TRIES = 16
"""Children drawn before the settings left are listed one by one."""
_BROOD = 8
"""Children of which the predictor chooses one. Of many more it would choose what it thinks best again and again, and
the search would end where the predictor is wrong."""
_BOLDNESS = 0.5
"""Share of a prediction's uncertainty that a draw of it has. With all of it, searches of 100 candidates on the
supernets of `benchmarks/search_supernet.py` ended 0.023 points lower on digits (60 pairs of searches, standard error
0.006) and 0.14 points lower on CIFAR-10 (36 pairs, 0.06)."""
_TRAINING_COUNTS = 30
"""What training thought of widths counts as much as so many scores."""
_LEARNED = 4096
"""So many latest scores are learned from: more would make a proposal slow and tell it little."""
_LISTED = 4096
"""Settings listed beyond those already known."""
_REFITS = 16
"""The predictor learns anew whenever there are a sixteenth more scores: one more tells it ever less, and learning takes
longer than all else that a proposal does."""


class SpaceExhausted(RuntimeError):  # noqa: N818 - says what happened, as StopIteration does
    """Every setting inside the limits has been proposed already."""


class PriorEvolutionSampler(BaseSampler):
    """Propose widths by evolution: prior samples first, then children of the best, repaired into the limits.

    A proposal depends on `seed`, on the number of different settings proposed before and on the completed trials:
    a study that was interrupted and goes on in one process proposes what it would have proposed without the break.

    Args:
        space: The width space.
        limits: Reachable limits; no setting outside them is proposed, unless `propose` is given others.
        prior: What is known before the search; None for nothing.
        seed: Seed of all proposals.
        population_size: Parents are chosen among so many best trials.
        num_seeds: How many settings come from the prior before the first child.
        fresh_share: Share of prior samples among later proposals.
        learn: Whether the prior learns from completed trials.
        predictor: Chooses among many children the one whose score promises most; None to take them as they come.
    """

    def __init__(
        self,
        space: WidthSpace,
        limits: Limits,
        *,
        prior: Prior | None = None,
        seed: int = 0,
        population_size: int = 16,
        num_seeds: int = 12,
        fresh_share: float = 0.2,
        learn: bool = True,
        predictor: Predictor | None = None,
    ) -> None:
        self.space = space
        self.limits = limits
        self.seed = seed
        self.population_size = population_size
        self.num_seeds = num_seeds
        self.fresh_share = fresh_share
        self.learn = learn
        self.predictor = predictor
        self._informed = prior is not None
        self._prior = Prior.uniform(space) if prior is None else prior.on(space)
        self._flat = Prior.uniform(space)
        self.distributions = width_distributions(space)
        self._listed: dict[Limits, tuple[np.ndarray, bool]] = {}
        self._predicts: tuple[bytes, Predictor] | None = None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return one distribution for each group."""
        return self.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the widths of the next trial; see `propose`."""
        # The trial itself has no widths yet, so it does not count.
        tried = self.tried()
        tried.read(study.get_trials(deepcopy=False))
        return dict(self.propose(tried))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refuse: a group alone says nothing about the limits.

        Raises:
            ValueError: Always; the objective asks for a parameter that is no group of the space.
        """
        raise ValueError(f"parameter {param_name!r} is no channel group of the space, or its choices differ")

    def propose(self, tried: Tried, limits: Limits | None = None) -> Widths:
        """Return a setting inside limits that none of the trials has.

        Prior and predictor learn from the latest trials, wherever they are; only those inside the limits are parents.

        Args:
            tried: What has been tried in the study.
            limits: Reachable limits; None for the sampler's own.

        Raises:
            SpaceExhausted: The trials have every setting inside the limits.
        """
        limits = limits or self.limits
        rng = np.random.default_rng([self.seed, tried.num_settings])
        # The more scores there are, the more often a proposal is free of what training thought, which may be wrong.
        is_free = self._informed and rng.random() * (tried.num_scores + _TRAINING_COUNTS) >= _TRAINING_COUNTS
        prior = self._flat if is_free else self._prior
        if self.learn and tried.num_scores >= 4 and not is_free:
            levels_NG, scores_N = tried.scored(at_most=_LEARNED)
            prior = prior.updated(self._prior.levels.widths(levels_NG), scores_N.tolist())
        proposal = prior.proposal(limits)
        predictor = self._updated_predictor(tried)
        inside = tried.inside(limits, at_most=max(2, self.population_size))
        for attempt in range(_TRIES):
            # A converged population breeds what is known; later attempts mutate more.
            child_G = self._child(proposal, predictor, inside, attempt, rng)
            if not tried.knows(child_G):
                return self._widths(proposal, child_G)
        return self._widths(proposal, self._unseen(proposal, tried, rng))

    def predict(self, tried: Tried, widths: Widths) -> float | None:
        """Return what the predictor expects of a setting, from the completed trials; None where it knows no scores."""
        predictor = self._updated_predictor(tried)
        return None if predictor is None or predictor.scores is None else float(predictor.predict([widths])[0][0])

    def tried(self) -> Tried:
        """Return what has been tried in a study of which nothing has been read yet."""
        return Tried(self._prior.levels)

    def _updated_predictor(self, tried: Tried) -> Predictor | None:
        """Return the predictor with all or nearly all scores, or None while it could not tell settings apart."""
        if self.predictor is None:
            return None
        # By the number of scores and not by what this process has done: a search that goes on must propose the same.
        num_learned = tried.num_scores - tried.num_scores % max(1, tried.num_scores // _REFITS)
        levels_NG, scores_N = tried.scored(at_most=_LEARNED, among_first=num_learned)
        # The same sampler may serve another study, so the number of scores alone says nothing.
        known = levels_NG.tobytes() + scores_N.tobytes()
        if self._predicts is None or self._predicts[0] != known:
            widths_NG = self._prior.levels.widths(levels_NG)
            self._predicts = known, self.predictor.updated(widths_NG, scores_N.tolist())
        predictor = self._predicts[1]
        return predictor if predictor.knows_something else None

    def _child(
        self,
        proposal: Proposal,
        predictor: Predictor | None,
        inside: Inside,
        attempt: int,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Make one setting inside the limits, shape (G,)."""
        num = 1 if predictor is None else _BROOD
        num_known = inside.num_settings
        if num_known < self.num_seeds or len(inside.scores) < 2 or rng.random() < self.fresh_share:
            likeliest = self._informed and num_known == 0 and attempt == 0
            children_KG = proposal.probability.argmax(axis=1)[None] if likeliest else proposal.draw(num, rng)
        else:
            children_KG = self._bred(proposal, inside.levels[: self.population_size], attempt, num, rng)
        children_KG = proposal.repair(children_KG, rng)
        if predictor is not None:
            mean_K, std_K = predictor.predict(proposal.levels.widths(children_KG))
            # One draw of each child's score (after Thompson 1933): what is uncertain gets its chance.
            drawn_K = mean_K + _BOLDNESS * std_K * rng.normal(size=len(mean_K))
            children_KG = children_KG[[int(drawn_K.argmax())]]
        return proposal.grow(children_KG[0], rng)

    def _bred(
        self,
        proposal: Proposal,
        parents_NG: np.ndarray,
        attempt: int,
        num: int,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Return children of the best, mixed group by group and mutated, inside the limits or not, shape (num, G)."""
        num_groups = len(self.space.groups)
        mother_K, father_K = (rng.integers(len(parents_NG), size=(num, 2)).min(axis=1) for _ in range(2))
        mix_KG = rng.random((num, num_groups)) < 0.5
        children_KG = np.where(mix_KG, parents_NG[mother_K], parents_NG[father_K])
        return proposal.mutate(children_KG, min(1.0, (1.0 + attempt) / num_groups), rng)

    def _unseen(self, proposal: Proposal, tried: Tried, rng: np.random.Generator) -> np.ndarray:
        listed_NG = self._first_settings(proposal, tried.num_settings + _LISTED)
        unseen_NG = listed_NG[[not tried.knows(row_G) for row_G in listed_NG]]
        if not len(unseen_NG):
            # More settings than known are listed where there are more: the list is complete.
            raise SpaceExhausted(f"all {len(listed_NG)} settings inside the limits are known")
        return unseen_NG[(proposal.score(unseen_NG) + rng.gumbel(size=len(unseen_NG))).argmax()]

    def _first_settings(self, proposal: Proposal, at_most: int) -> np.ndarray:
        """List settings inside limits, smallest first; the list is made for more, and used again and again."""
        listed_NG, is_complete = self._listed.get(proposal.limits, (np.zeros((0, 0), dtype=np.int64), False))
        if len(listed_NG) < at_most and not is_complete:
            self._listed[proposal.limits] = listed_NG, _ = proposal.list_fitting(2 * at_most)
        return listed_NG[:at_most]

    def _widths(self, proposal: Proposal, levels_G: np.ndarray) -> Widths:
        return self.space.from_array(proposal.levels.widths(levels_G[None]))[0]


def width_distributions(space: WidthSpace) -> dict[str, BaseDistribution]:
    """Return an Optuna distribution for each group; its values are the widths themselves."""
    return {group.name: _distribution(group.choices) for group in space.groups}


def _distribution(choices: Sequence[int]) -> BaseDistribution:
    gaps = set(np.diff(choices).tolist()) or {1}
    if len(gaps) > 1:
        return CategoricalDistribution(choices)
    # Evenly spaced widths are ordered numbers to Optuna's own samplers and to its dashboard.
    return IntDistribution(choices[0], choices[-1], step=gaps.pop())
