"""The sections of the report on what a run found: comparison, front, widths, training, prior, ranking, frozen."""

from collections.abc import Sequence
from typing import Any

from psenet.report.blocks import Bar, Block, Cell, Chart, Choice, Paragraph, Section, Slider, Table
from psenet.report.decision import interval, score_name
from psenet.report.drawings import PICKED, draw_curves, draw_front, draw_prior_map, draw_ranking
from psenet.report.facts import NETS, Candidate, NetFacts, RunFacts
from psenet.report.shown import DASH, digits, in_bytes, in_ms, percent, points, share, short, with_share
from psenet.report.text import TEXT, Words

_FOLD_ABOVE = 40
"""Longer tables are shown on demand."""
_PRIOR_ROWS = 8


def comparison(facts: RunFacts, words: Words) -> Section:
    """Return the three nets side by side."""
    nets = [facts.nets.get(name, NetFacts()) for name in NETS]
    base = nets[0]
    where = facts.result.get("accuracy_on")
    where = words(where) if where in ("test data", "validation data") else words("unknown")
    spans, score = [interval(net, facts) for net in nets], score_name(facts, words)
    rows: list[tuple[Cell, ...]] = [
        (words("macs"), *(with_share(short(net.macs), net.macs, base.macs) for net in nets)),
        (words("flops"), *(short(None if net.macs is None else 2 * net.macs) for net in nets)),
        (words("params"), *(with_share(short(net.params), net.params, base.params) for net in nets)),
        (
            words("weights_bytes"),
            *(with_share(in_bytes(net.weights_bytes), net.weights_bytes, base.weights_bytes) for net in nets),
        ),
        (words("memory"), *(with_share(in_bytes(net.memory), net.memory, base.memory) for net in nets)),
        (words("latency_row", batch=facts.batch_size), *(in_ms(net.latency_ms) for net in nets)),
        (words("quartiles"), *(_quartiles(net) for net in nets)),
        (words("speed_up"), *(_speed_up(base, net) for net in nets)),
        (words("before_finetune", score=score), *(facts.show_score(net.accuracy_before_finetune) for net in nets)),
        (words("accuracy_row", score=score, where=where), *(facts.show_score(net.accuracy) for net in nets)),
        (words("interval"), *(DASH if span is None else f"{span[0]:.2f}–{span[1]:.2f}\u00a0%" for span in spans)),
    ]
    header = (words("metric"), *(words(name) for name in NETS))
    notes = [words("compare_units"), _measured_by(facts, words)]
    notes.append(_about_intervals(facts, words))
    return Section(
        name="compare",
        title=words("compare"),
        blocks=(
            Paragraph(text=words("compare_lead")),
            Table(header=header, rows=tuple(rows)),
            *(Paragraph(text=note, is_note=True) for note in notes if note),
        ),
    )


def _about_intervals(facts: RunFacts, words: Words) -> str:
    if not facts.is_accuracy:
        return words("no_interval_of_score", score=score_name(facts, words))
    return (
        words("no_interval") if facts.num_samples is None else words("compare_interval", count=f"{facts.num_samples:,}")
    )


def _measured_by(facts: RunFacts, words: Words) -> str:
    runner = facts.runner
    if not runner:
        return ""
    hardware = facts.result.get("hardware")
    threads = runner.get("num_threads") or (hardware.get("threads") if isinstance(hardware, dict) else None)
    shown = {"engine": runner.get("engine", "eager"), "device": runner.get("device", "cpu"), "threads": threads or "?"}
    return words("compare_latency", **shown)


def _quartiles(net: NetFacts) -> str:
    if net.latency_quartiles_ms is None:
        return DASH
    low, high = net.latency_quartiles_ms
    return f"{digits(low)}–{digits(high)}\u00a0ms"


def _speed_up(base: NetFacts, net: NetFacts) -> str:
    return f"{base.latency_ms / net.latency_ms:.2f}×" if base.latency_ms and net.latency_ms else DASH


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that are better than every one as cheap or cheaper, by MACs, ascending.

    Those whose scoring was stopped early are left out.
    """
    front: list[Candidate] = []
    whole = (one for one in candidates if not one.is_estimate)
    for one in sorted(whole, key=lambda one: (one.macs, -one.score)):
        if not front or one.score > front[-1].score:
            front.append(one)
    return front


def front_section(facts: RunFacts, words: Words) -> Section:
    """Return what the search scored: the front, and a slider over it."""
    base = facts.nets.get("baseline")
    front = pareto_front(facts.candidates)
    if not front or base is None or not base.macs:
        return _empty("front", words, "no_candidates")
    full_macs = base.macs
    data, layout = draw_front(
        facts.candidates, front, full_macs=full_macs, kept=facts.result.get("widths") or {}, words=words
    )
    counts = {"count": len(facts.candidates), "num_front": len(front)}
    chart = Chart(name="front-chart", data=data, layout=layout, summary=words("front_summary", **counts))
    return Section(
        name="front",
        title=words("front"),
        blocks=(
            Paragraph(text=words("front_lead", count=len(facts.candidates))),
            chart,
            _slider(facts, front, full_macs, words),
        ),
    )


def _slider(facts: RunFacts, front: Sequence[Candidate], full_macs: float, words: Words) -> Slider:
    with_memory = all(one.memory is not None for one in front)
    with_latency = all(one.latency_ms is not None for one in front)
    labels = ["macs", "params", *["memory"] * with_memory, *["latency_predicted"] * with_latency, "score"]

    def values(one: Candidate) -> tuple[str, ...]:
        shown = [with_share(short(one.macs), one.macs, full_macs), short(one.params)]
        shown += [in_bytes(one.memory)] * with_memory + [in_ms(one.latency_ms)] * with_latency
        return (*shown, percent(one.score) if facts.is_accuracy else f"{one.score:.4g}")

    pruned = facts.nets.get("pruned")
    budget = pruned.macs if pruned is not None and pruned.macs else full_macs
    widest = facts.result.get("full_widths") or {}
    groups = {name: int(widest.get(name) or max(one.widths[name] for one in front)) for name in front[0].widths}
    return Slider(
        chart="front-chart",
        trace=PICKED,
        choices=tuple(
            Choice(
                share=round(100 * one.macs / full_macs, 3),
                score=one.score,
                facts=values(one),
                widths=tuple(one.widths.get(name, 0) for name in groups),
            )
            for one in front
        ),
        start=max((number for number, one in enumerate(front) if one.macs <= budget), default=0),
        labels=tuple(words(label) for label in labels),
        groups=groups,
        words={
            "label": words("slider"),
            "group": words("group"),
            "width": words("width"),
            "share": words("share_kept"),
        },
    )


def widths_section(facts: RunFacts, words: Words) -> Section:
    """Return every layer's width before and after."""
    if not facts.layers:
        return _empty("widths", words, "no_widths")
    of_groups = not facts.layers[0].kind
    rows: list[tuple[Cell, ...]] = []
    for layer in facts.layers:
        kept = Bar(share=layer.pruned / layer.full if layer.full else 0.0)
        kind = () if of_groups else (layer.kind,)
        rows.append((layer.name, *kind, str(layer.full), str(layer.pruned), kept, str(layer.uniform)))
    kind = () if of_groups else (words("kind"),)
    header = (words("group" if of_groups else "layer"), *kind)
    header += (words("before"), words("after"), words("share_kept"), words("uniform"))
    table = Table(
        header=header,
        rows=tuple(rows),
        words=frozenset({0} if of_groups else {0, 1}),
        folded=words("show_layers", count=len(rows)) if len(rows) > _FOLD_ABOVE else "",
    )
    lead = Paragraph(text=words("groups_lead" if of_groups else "widths_lead"))
    return Section(name="widths", title=words("widths"), blocks=(lead, table))


def curves_section(facts: RunFacts, words: Words) -> Section:
    """Return how the losses fell."""
    curves = {name: epochs for name, epochs in facts.curves.items() if epochs}
    if not curves:
        return _empty("curves", words, "no_curves")
    names = {name: words(f"training_{name}") if f"training_{name}" in TEXT else name for name in curves}
    data, layout = draw_curves(curves, names, words)
    rows = tuple(
        (
            names[name],
            str(epochs[-1].epoch + 1),
            f"{epochs[0].loss:.4g}",
            f"{epochs[-1].loss:.4g}",
            f"{sum(one.seconds for one in epochs):.1f}",
        )
        for name, epochs in curves.items()
    )
    header = tuple(words(key) for key in ("training", "epochs", "first_loss", "last_loss", "seconds"))
    summary = words("curves_summary", names=words("joined").join(names.values()))
    return Section(
        name="curves",
        title=words("curves"),
        blocks=(
            Paragraph(text=words("curves_lead")),
            Chart(name="curves-chart", data=data, layout=layout, summary=summary),
            Table(header=header, rows=rows),
        ),
    )


def prior_section(facts: RunFacts, words: Words) -> Section:
    """Return which groups the prior thinks worth their cost, at every cost and near that of the pruned net."""
    record = facts.prior
    if record is None:
        return _empty("prior", words, "no_prior")
    data, layout = draw_prior_map(record, words)
    base, pruned = (facts.nets.get(name, NetFacts()).macs for name in ("baseline", "pruned"))
    wanted = pruned / base if base and pruned else 0.5
    near = min(range(len(record["macs_shares"])), key=lambda place: abs(record["macs_shares"][place] - wanted))
    at = share(record["macs_shares"][near], 1)
    lead = "prior_lead" if record["versus"] == "visits" else "prior_groups_lead"
    header = tuple(words(key) for key in ("group", "prior_keeps", "prior_usual", "prior_difference"))
    return Section(
        name="prior",
        title=words("prior"),
        blocks=(
            Paragraph(text=words(lead)),
            Chart(
                name="prior-chart",
                data=data,
                layout=layout,
                summary=words("prior_summary", count=len(record["groups"]), share=at),
            ),
            Paragraph(text=words("prior_table", share=at)),
            Table(header=header, rows=_prior_rows(record, near)),
        ),
    )


def _prior_rows(record: Any, place: int) -> tuple[tuple[Cell, ...], ...]:
    """Return the groups that differ most in one bin, the widest first."""
    keeps, usual = record["keeps"][place], record["usual"][place]
    usual = usual if len(usual) == len(keeps) else [usual[0]] * len(keeps)
    differences = [100 * (ours - theirs) for ours, theirs in zip(keeps, usual, strict=True)]
    most = sorted(range(len(keeps)), key=lambda number: -abs(differences[number]))[:_PRIOR_ROWS]
    return tuple(
        (
            str(record["groups"][number]),
            share(keeps[number], 1),
            share(usual[number], 1),
            points(differences[number]),
        )
        for number in sorted(most, key=lambda number: -differences[number])
    )


def ranking_section(facts: RunFacts, words: Words) -> Section | None:
    """Return how well the supernet ranks, where that was measured."""
    ranking = facts.ranking
    if ranking is None:
        return None
    data, layout = draw_ranking(ranking, words)
    count = len(ranking.subnets)
    blocks: list[Block] = [Paragraph(text=words("ranking_lead", count=count, tau=f"{ranking.tau:.2f}"))]
    if ranking.by_macs_tau is not None:
        blocks.append(Paragraph(text=words("ranking_macs", tau=f"{ranking.by_macs_tau:.2f}")))
    summary = words("ranking_summary", count=count)
    blocks.append(Chart(name="ranking-chart", data=data, layout=layout, summary=summary))
    rows = tuple((percent(one.score), percent(one.accuracy_alone)) for one in ranking.subnets)
    blocks.append(Table(header=(words("score_axis"), words("accuracy_alone")), rows=rows, words=frozenset()))
    return Section(name="ranking", title=words("ranking"), blocks=tuple(blocks))


def frozen_section(facts: RunFacts, words: Words) -> Section:
    """Return what could not vary, the costliest first."""
    if not facts.frozen:
        return _empty("frozen", words, "frozen_unknown" if facts.frozen is None else "frozen_none")
    rows = tuple(
        (layer.layer, percent(100 * layer.macs_share, 1), layer.reason)
        for layer in sorted(facts.frozen, key=lambda layer: -layer.macs_share)
    )
    table = Table(
        header=(words("layer"), words("macs_share"), words("reason")),
        rows=rows,
        words=frozenset({0, 2}),
        folded=words("show_layers", count=len(rows)) if len(rows) > _FOLD_ABOVE else "",
    )
    lead = Paragraph(text=words("frozen_lead", count=len(rows)))
    return Section(name="frozen", title=words("frozen"), blocks=(lead, table))


def _empty(name: str, words: Words, says: str) -> Section:
    return Section(name=name, title=words(name), blocks=(Paragraph(text=words(says)),))
