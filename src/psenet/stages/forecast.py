"""What a run will do and how long it will take, before any hour is spent."""

from collections.abc import Sequence
from typing import Any

from psenet.estimate import estimate_seconds, say_duration
from psenet.inputs import num_samples
from psenet.stages.run import Run
from psenet.supernet import Supernet

STEPS = {"train": ("baseline", "supernet"), "search": ("search",), "finetune": ("finetune",), "export": ()}
"""What the time of each stage is made of."""


def announce(run: Run, *, stage: str | None = None) -> dict[str, float]:
    """Say what will be done, all of it or one stage, and how long that will take.

    Returns:
        The expected seconds by what they are spent on.
    """
    space, full = run.space, run.space.full()
    least = space.macs(space.smallest()) / space.macs(full)
    run.say(
        f"{run.names['model']}: {space.macs(full) / 1e6:.1f}M MACs, {space.params(full) / 1e6:.2f}M parameters, "
        f"{len(space.groups)} channel groups, reachable down to {least:.0%} of the MACs"
    )
    run.say(f"budget: {run.limits.describe(space)}")
    seconds = estimate(run)
    if stage is not None:
        seconds = {name: time for name, time in seconds.items() if name in STEPS[stage]}
    if seconds:
        stages = ", ".join(f"{name} {say_duration(time)}" for name, time in seconds.items() if time > 0)
        run.say(f"expected time: about {say_duration(sum(seconds.values()))} ({stages})")
    return seconds


def estimate(run: Run) -> dict[str, float]:
    """Return the seconds that each stage should take from its start; nothing for trainings that are finished."""
    config, epoch = run.config, len(run.loaders.train)
    generator = run.loaders.train.generator
    state = None if generator is None else generator.get_state()
    batch = next(iter(run.loaders.train))
    if generator is not None and state is not None:
        generator.set_state(state)
    if run.num_ranks > 1:  # each trains on its part of the batch
        from accelerate.utils import slice_tensors

        batch = slice_tensors(batch, slice(0, num_samples(batch[0]) // run.num_ranks))
    supernet, full = Supernet(run.model, run.space), run.space.macs(run.space.full())
    has_baseline = config.trained or run.folder.has("stages/baseline.safetensors")
    return estimate_seconds(
        run.model,
        supernet,
        (batch[0], batch[1]),
        loss_fn=run.task.loss(config.supernet),
        steps={
            "baseline": 0 if has_baseline else config.baseline.epochs * epoch,
            "supernet": 0 if run.folder.has("stages/supernet.safetensors") else config.supernet.epochs * epoch,
            "finetune": 2 * config.finetune.epochs * epoch,
        },
        num_subnets=config.num_subnets,
        strategy=config.strategy,
        focus=run.focus,
        num_calibration=_num_images(run.loaders.calibration),
        num_validation=_num_images(run.loaders.validation),
        num_evaluations=config.num_evaluations + config.num_front_evaluations,
        keep_ratio=(run.limits.macs or full) / full,
        device=run.device,
    )


def _num_images(batches: Sequence[Any]) -> int:
    return sum(num_samples(batch[0]) for batch in batches)
