"""The fine-tuning stage: nets of the budget become what they can be, and the better one is kept."""

import copy
from dataclasses import dataclass

from torch import nn

from psenet.devices import on_device
from psenet.evaluate import recalibrate
from psenet.stages.run import Run
from psenet.supernet import Supernet
from psenet.training.plain import train_model
from psenet.widths import Widths


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A net of the budget, before and after fine-tuning."""

    widths: Widths
    module: nn.Module
    before: nn.Module


def fine_tuned(run: Run, name: str, widths: Widths, *, supernet: Supernet, baseline: nn.Module) -> Finalist:
    """Extract a net and fine-tune it; its fine-tuned weights are the stage's result."""
    net = supernet.extract(widths).eval()
    with on_device(net, run.device):
        recalibrate(net, run.loaders.calibration)
    before = copy.deepcopy(net)
    if not run.folder.has(f"stages/{name}.safetensors"):
        run.say(f"fine-tuning the {name} net")
        with run.folder.stage("finetune"):
            run.seed(4)
            train_model(
                net,
                run.loaders.train,
                config=run.config.finetune,
                loss_fn=run.task.loss(run.config.finetune),
                teacher=baseline,
                checkpoint=run.folder.checkpoint(name),
                record=run.recorder(name),
                description=f"fine-tune {name}",
                show_progress=run.show_progress,
            )
            run.folder.save_weights(name, net)
    run.folder.load_weights(name, net)
    return Finalist(widths=widths, module=net.eval(), before=before)


def choose(run: Run, searched: Finalist, uniform: Finalist) -> str:
    """Return "searched" if that net is the better one on validation data, else "uniform".

    The search took the best of many candidates on these very data, so a part of its lead is luck. It has to lead by
    more than a standard error to be kept: what cannot be told apart from the plain net is not worth its trouble.
    """
    if searched is uniform:
        shown = run.task.show(run.score(searched.module))
        run.say(f"fine-tuned, on validation data: {shown}; the search returned the uniform widths")
        return "searched"
    with on_device(searched.module, run.device), on_device(uniform.module, run.device):
        lead, error = run.task.difference(searched.module, uniform.module, run.loaders.validation)
    kept = "searched" if lead > error else "uniform"
    shown = f"{run.task.show(run.score(uniform.module))}, the searched one {lead:+.2f} points (+- {error:.2f})"
    run.say(f"fine-tuned, on validation data: the uniform net {shown}; the {kept} one is kept")
    return kept
