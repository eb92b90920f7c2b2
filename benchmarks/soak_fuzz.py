"""Ask every guarantee of many random networks: one pass equals each subnet alone, costs are those counted, and so on.

    python benchmarks/soak_fuzz.py --nets 1000

Net number n is `RandomNet(n)` of `tests/random_nets.py`; what is asked is `check` of `tests/fuzzing.py`. Ends with an
error if any net fails; every failing seed is in the result.
"""

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evidence import write_result

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from fuzzing import Finding, check  # noqa: E402


def main(nets: int, *, first: int = 0) -> int:
    """Check some nets, write `results/fuzz.json`, and return how many failed.

    Args:
        nets: How many.
        first: The seed of the first; the others follow.
    """
    torch.set_num_threads(1)
    start = time.perf_counter()
    findings, failures = [], []
    for number, seed in enumerate(range(first, first + nets), 1):
        try:
            findings.append(check(seed))
        except AssertionError as error:
            failures.append(str(error))
            print(error, flush=True)
        if number % 100 == 0:
            print(f"{number} nets, {len(failures)} failed", flush=True)
    seconds = round(time.perf_counter() - start, 1)
    figures = {"first_seed": first, **summary(findings, failures), "seconds": seconds}
    print(f"figures: {write_result('fuzz', figures, seed=first)}")
    return len(failures)


def summary(findings: list[Finding], failures: list[str]) -> dict[str, Any]:
    """Return the figures over some nets."""
    traced = [finding for finding in findings if not finding.refused]
    groups, frozen = sum(finding.groups for finding in traced), sum(len(finding.frozen) for finding in traced)
    return {
        "nets": len(findings) + len(failures),
        "equal": len(traced),
        "failed": [failure.partition("\n")[0] for failure in failures],
        "refused": _count(_refusal(finding.refused) for finding in findings if finding.refused),
        "groups": groups,
        "frozen_layers": frozen,
        "frozen_because": _count(_cause(reason) for finding in traced for reason in finding.frozen),
        "share_of_groups_free": round(groups / max(groups + frozen, 1), 4),
        "mean_elastic_share_of_macs": round(float(np.mean([finding.elastic_share for finding in traced])), 4),
        "largest_deviation": max((finding.deviation for finding in traced), default=0.0),
    }


def _count(reasons: Iterable[str]) -> dict[str, int]:
    return dict(Counter(reasons).most_common())


def _refusal(message: str) -> str:
    """Return why a net is refused; where nothing can vary, what froze its first layer."""
    what, _, layers = message.partition(". What froze it: ")
    return f"{what}: {_cause(layers.partition(': ')[2].partition('; ')[0])}" if layers else _cause(message)


def _cause(reason: str) -> str:
    """Return a reason without the place and the numbers of one net."""
    reason = re.sub(r" in [\w.]+\)", ")", reason)
    return re.sub(r"(is allowed than) \d+", r"\1 n", reason.partition(": ")[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=int, default=1000, help="how many networks")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the seed of the first")
    arguments = parser.parse_args()
    sys.exit(1 if main(arguments.nets, first=arguments.first) else 0)
