"""The training stages: the full model, then the supernet that starts from it."""

from torch import nn

from psenet import ranks
from psenet.history import History
from psenet.importance import order_channels
from psenet.stages.run import Run
from psenet.supernet import Supernet
from psenet.training.plain import train_model
from psenet.training.supernet import train_supernet


def trained_baseline(run: Run) -> nn.Module:
    """Return the trained full model, its channels ordered by importance."""
    if not run.folder.has("stages/baseline.safetensors"):
        with run.folder.stage("baseline"):
            run.seed(1)
            if not run.config.trained:
                run.say("training the baseline")
                train_model(
                    run.model,
                    run.loaders.train,
                    config=run.config.baseline,
                    loss_fn=run.task.loss(run.config.baseline),
                    checkpoint=run.folder.checkpoint("baseline"),
                    record=run.recorder("baseline"),
                    description="baseline",
                    show_progress=run.show_progress,
                )
            run.folder.save_weights("baseline", order_channels(run.model, run.space))
    run.folder.load_weights("baseline", run.model)
    run.say_score("baseline:", run.model, " on validation data")
    return run.model.eval()


def trained_supernet(run: Run, baseline: nn.Module) -> tuple[Supernet, History]:
    """Return the trained supernet and what its training saw."""
    history_path = run.folder.file("stages/history.npz")
    supernet = Supernet(baseline, run.space, compiled=run.config.compiled)
    if run.folder.has("stages/supernet.safetensors", "stages/history.npz"):
        run.folder.load_weights("supernet", supernet.model)
        return supernet, ranks.from_main(lambda: History.load(history_path, run.space))
    run.say(f"training the supernet ({run.config.strategy})")
    with run.folder.stage("supernet"):
        run.seed(2)
        history = train_supernet(
            supernet,
            run.loaders.train,
            num_subnets=run.config.num_subnets,
            strategy=run.config.strategy,
            focus=run.focus,
            config=run.config.supernet,
            loss_fn=run.task.loss(run.config.supernet),
            teacher=baseline if run.config.supernet.distill_weight else None,
            seed=run.config.seed,
            checkpoint=run.folder.checkpoint("supernet"),
            record=run.recorder("supernet"),
            show_progress=run.show_progress,
        )
        run.logs.subnets(history, steps_per_epoch=len(run.loaders.train))
        ranks.in_main(lambda: history.save(history_path))
        run.folder.save_weights("supernet", supernet.model)
    return supernet, history
