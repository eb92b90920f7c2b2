"""The decision in three lines: what was gained, whether the budget is kept, and what the search was good for."""

from collections.abc import Callable, Mapping

from psenet.report.confidence import overlap, wilson_interval
from psenet.report.facts import NetFacts, RunFacts
from psenet.report.shown import change, in_bytes, in_ms, points, share, short
from psenet.report.text import Words

SHOWN: Mapping[str, Callable[[float | None], str]] = {
    "macs": short,
    "params": short,
    "memory": in_bytes,
    "weights_bytes": in_bytes,
    "latency_ms": in_ms,
}
"""How an amount of each cost is written."""


def decision_lines(facts: RunFacts, words: Words) -> tuple[str, ...]:
    """Return at most three lines, none of which says more than the figures do."""
    if "pruned" not in facts.nets or "baseline" not in facts.nets:
        return (words("unfinished"),)
    lines = [_gain(facts, words), _budget(facts, words), _search(facts, words)]
    if facts.result.get("accuracy_on") == "validation data":
        lines[0] += " " + words("flattered")
    return tuple(line for line in lines if line)


def score_name(facts: RunFacts, words: Words) -> str:
    """Return what the nets are judged by: accuracy in the report's language, a score of the user's as it is named."""
    return words("accuracy") if facts.is_accuracy else str(facts.result["score_name"])


def interval(net: NetFacts, facts: RunFacts) -> tuple[float, float] | None:
    """Return the 95 % interval of a net's accuracy, in percent, where the run says on how many samples it is."""
    if not facts.is_accuracy or net.accuracy is None or facts.num_samples is None or not 0 <= net.accuracy <= 100:
        return None
    return wilson_interval(net.accuracy, facts.num_samples)


def _gain(facts: RunFacts, words: Words) -> str:
    base, pruned = facts.nets["baseline"], facts.nets["pruned"]
    parts = []
    if base.macs is not None and pruned.macs is not None:
        shown = {"before": short(base.macs), "after": short(pruned.macs), "share": share(pruned.macs, base.macs)}
        parts.append(words("decision_macs", **shown))
    if base.latency_ms and pruned.latency_ms:
        parts.append(
            words(
                "decision_latency",
                before=in_ms(base.latency_ms),
                after=in_ms(pruned.latency_ms),
                speed=f"{base.latency_ms / pruned.latency_ms:.2f}×",
                doubt=_said("clause", _latency_doubt(base, pruned, words), words),
            )
        )
    if base.accuracy is not None and pruned.accuracy is not None:
        parts.append(
            words(
                "decision_accuracy",
                score=score_name(facts, words),
                before=facts.show_score(base.accuracy),
                after=facts.show_score(pruned.accuracy),
                difference=points(pruned.accuracy - base.accuracy),
                doubt=_said("clause", _doubt(base, pruned, facts, words), words),
            )
        )
    return words("sentence", parts=words("joined").join(parts)) if parts else ""


def _said(how: str, text: str, words: Words) -> str:
    """Return a remark as a clause or an aside; nothing for no remark."""
    return words(how, text=text) if text else ""


def _latency_doubt(one: NetFacts, other: NetFacts, words: Words) -> str:
    spreads = one.latency_quartiles_ms, other.latency_quartiles_ms
    overlaps = spreads[0] is not None and spreads[1] is not None and overlap(spreads[0], spreads[1])
    return words("latency_doubt") if overlaps else ""


def _doubt(one: NetFacts, other: NetFacts, facts: RunFacts, words: Words) -> str:
    """Return whether the accuracies can be told apart, where that can be said."""
    first, second = interval(one, facts), interval(other, facts)
    if first is None or second is None:
        return ""
    key = "accuracy_overlap" if overlap(first, second) else "accuracy_apart"
    return words(key, count=f"{facts.num_samples:,}")


def _budget(facts: RunFacts, words: Words) -> str:
    given, limits = facts.result.get("budget"), facts.result.get("limits")
    pruned = facts.nets["pruned"]
    if not isinstance(limits, Mapping) or not limits:
        if not isinstance(given, Mapping) or not given:
            return ""
        shown = words("joined").join(f"{words(name)} {value}" for name, value in given.items() if name in SHOWN)
        return words("budget_unknown", parts=shown)
    parts, is_kept = [], True
    for name, limit in limits.items():
        amount = _limited_amount(facts, name) if name == "latency_ms" else getattr(pruned, name, None)
        if name not in SHOWN or amount is None or not isinstance(limit, int | float):
            continue
        keeps = amount <= limit
        # A measured latency may exceed its limit by what two measurements of one net differ by.
        tolerated = name == "latency_ms" and not keeps and _search_says_kept(facts)
        key = "limit_kept" if keeps else "limit_tolerated" if tolerated else "limit_missed"
        is_kept &= keeps or tolerated
        parts.append(words(key, cost=words(name), amount=SHOWN[name](amount), limit=SHOWN[name](limit)))
    return words("budget_kept" if is_kept else "budget_missed", parts=words("joined").join(parts)) if parts else ""


def _latency_of_search(facts: RunFacts) -> Mapping[str, object]:
    """Return what the search measured of the net that was kept; nothing where another net was kept."""
    search = facts.result.get("search")
    if not isinstance(search, Mapping) or search.get("kept") != "searched":
        return {}
    latency = search.get("latency")
    return latency if isinstance(latency, Mapping) else {}


def _limited_amount(facts: RunFacts, name: str) -> float | None:
    """Return the latency that the budget was held against: that of the search, else that of the final comparison."""
    measured = _latency_of_search(facts).get("measured_ms")
    return measured if isinstance(measured, int | float) else getattr(facts.nets["pruned"], name)


def _search_says_kept(facts: RunFacts) -> bool:
    return _latency_of_search(facts).get("keeps_budget") is True


def _search(facts: RunFacts, words: Words) -> str:
    """Return what the search was good for: the pruned net against the uniform one."""
    uniform, pruned = facts.nets.get("uniform"), facts.nets["pruned"]
    search = facts.result.get("search")
    kept = search.get("kept") if isinstance(search, Mapping) else None
    if kept == "uniform":
        return words("kept_uniform") + _searched_accuracy(facts, words)
    if uniform is None:
        return ""
    widths = facts.result.get("widths"), facts.result.get("uniform_widths")
    if widths[0] == widths[1] and widths[0]:
        return words("same_as_uniform")
    parts = []
    for name in ("macs", "params", "latency_ms"):
        ours, theirs = getattr(pruned, name), getattr(uniform, name)
        if ours is not None and theirs:
            doubt = _latency_doubt(uniform, pruned, words) if name == "latency_ms" else ""
            shown = {"cost": words(name), "difference": change(ours, theirs), "doubt": _said("aside", doubt, words)}
            parts.append(words("versus_cost", **shown))
    if uniform.accuracy is not None and pruned.accuracy is not None:
        difference = points(pruned.accuracy - uniform.accuracy)
        doubt = _said("aside", _doubt(uniform, pruned, facts, words), words)
        parts.append(words("versus_accuracy", score=score_name(facts, words), difference=difference, doubt=doubt))
    return words("against_uniform", parts=words("joined").join(parts)) if parts else ""


def _searched_accuracy(facts: RunFacts, words: Words) -> str:
    searched, where = facts.result.get("searched"), facts.result.get("accuracy_on")
    accuracy = searched.get("accuracy") if isinstance(searched, Mapping) else None
    if not isinstance(accuracy, int | float) or where not in ("test data", "validation data"):
        return words("sentence", parts="")
    return words("searched_accuracy", accuracy=facts.show_score(accuracy), where=words(where))
