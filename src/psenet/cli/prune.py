"""`psenet prune`: the whole way from a model to a smaller one."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from psenet.cli.opening import Place
    from psenet.recipe import Override, Recipe

_TRAININGS = ("baseline", "supernet", "finetune")
KEYS: Mapping[str, tuple[str, ...]] = {
    "model": ("model.name",),
    "weights": ("model.weights",),
    "pretrained": ("model.pretrained",),
    "data": ("data.source",),
    **{name: (f"data.{name}",) for name in ("image_size", "batch_size", "max_train_images", "skip_unreadable")},
    **{name: (f"budget.{name}",) for name in ("macs", "params", "memory", "latency_ms")},
    "latency_engine": ("latency.engine",),
    "latency_device": ("latency.device",),
    "latency_threads": ("latency.num_threads",),
    "latency_batch": ("latency.batch_size",),
    **{f"{training}_epochs": (f"{training}.epochs",) for training in _TRAININGS},
    **{f"{training}_lr": (f"{training}.learning_rate",) for training in _TRAININGS},
    **{
        name: tuple(f"{training}.{name}" for training in _TRAININGS)
        for name in ("optimizer", "weight_decay", "mixed_precision")
    },
    "distill": ("finetune.distill_weight",),
    "evaluations": ("num_evaluations",),
    "front_evaluations": ("num_front_evaluations",),
    **{
        name: (name,)
        for name in (
            *(
                "strategy",
                "num_subnets",
                "focus",
                "compiled",
                "divisor",
                "min_ratio",
                "exclude",
                "opaque",
                "seed",
                "tensorboard",
            ),
        )
    },
}
"""The values of a recipe that each option sets."""


def prune(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option(help="The run directory.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A YAML file with all of this; see `psenet init`.")] = None,
    template: Annotated[str | None, typer.Option(help="Start from `pilot` (hours) or `full`.")] = None,
    trained_in: Annotated[
        Path | None, typer.Option("--from", help="A run: take all from it, its trained supernet too; see --macs.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any value of a recipe: supernet.momentum=0.8; repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how long it will take, and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, or start it.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes that score candidates.")] = 1,
    data_workers: Annotated[int, typer.Option(min=0, help="Processes that load data.")] = 0,
    model: Annotated[str | None, typer.Option(help="timm:NAME, torchvision:NAME or my.module:factory.")] = None,
    data: Annotated[
        str | None, typer.Option(help="`digits`, an image folder, or a name of timm's dataset factory.")
    ] = None,
    macs: Annotated[str | None, typer.Option(help="Budget of MACs: 50%, 300M.")] = None,
    params: Annotated[str | None, typer.Option(help="Budget of parameters: 50%, 2M.")] = None,
    memory: Annotated[str | None, typer.Option(help="Budget of peak activation memory: 50%, 4MB.")] = None,
    latency_ms: Annotated[str | None, typer.Option(help="Budget of measured latency: 4, 4ms, 50%.")] = None,
    latency_engine: Annotated[str, typer.Option(help="What runs it: eager, compile or onnxruntime.")] = "eager",
    latency_device: Annotated[str, typer.Option(help="Where: cpu, cuda, cuda:1, ...")] = "cpu",
    latency_threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's if not given.")] = None,
    latency_batch: Annotated[int, typer.Option(min=1, help="Samples in one pass.")] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    weights: Annotated[Path | None, typer.Option(help="Trained weights of the model (.safetensors).")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Take timm's pretrained weights.")] = False,
    image_size: Annotated[int | None, typer.Option(min=8, help="Derived from the data if not given.")] = None,
    batch_size: Annotated[int, typer.Option(min=2)] = 128,
    baseline_epochs: Annotated[int, typer.Option(min=1, help="Without trained weights only.")] = 30,
    supernet_epochs: Annotated[int, typer.Option(min=1)] = 30,
    finetune_epochs: Annotated[int, typer.Option(min=0)] = 10,
    evaluations: Annotated[int, typer.Option(min=1, help="Candidates that the search scores.")] = 100,
    front_evaluations: Annotated[int, typer.Option(min=0, help="More of them over all costs, for the report.")] = 24,
    baseline_lr: Annotated[float, typer.Option(help="Peak learning rate of the baseline.")] = 0.1,
    supernet_lr: Annotated[float, typer.Option(help="Peak learning rate of the supernet.")] = 0.05,
    finetune_lr: Annotated[float, typer.Option(help="Peak learning rate of fine-tuning.")] = 0.02,
    optimizer: Annotated[str, typer.Option(help="sgd or adamw.")] = "sgd",
    weight_decay: Annotated[float, typer.Option()] = 5e-4,
    distill: Annotated[float, typer.Option(help="Fine-tuning: share of the baseline's soft targets, 0 to 1.")] = 0.0,
    strategy: Annotated[str, typer.Option(help="parallel, steered, sandwich, bilateral or single-path.")] = "parallel",
    num_subnets: Annotated[int, typer.Option(min=1, help="Subnets per parallel step.")] = 8,
    focus: Annotated[bool, typer.Option("--focus", help="Train mostly subnets near the budget.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the supernet's passes; for GPUs.")] = False,
    divisor: Annotated[int, typer.Option(min=1, help="Widths are multiples of this.")] = 8,
    min_ratio: Annotated[float, typer.Option(help="Smallest width as a share of a group's size.")] = 0.25,
    exclude: Annotated[list[str] | None, typer.Option(help="Layers that must not vary; repeatable.")] = None,
    opaque: Annotated[list[str] | None, typer.Option(help="Modules not to read at all; repeatable.")] = None,
    max_train_images: Annotated[int | None, typer.Option(min=1, help="Train on so many images only.")] = None,
    skip_unreadable: Annotated[bool, typer.Option("--skip-unreadable", help="Leave broken images out.")] = False,
    mixed_precision: Annotated[str, typer.Option(help="no, fp16 or bf16.")] = "no",
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard logs to OUT/logs.")] = False,
) -> None:
    """Prune a model to a budget: train, search, fine-tune, export, compare.

    Everything can stand in a recipe (--recipe); options win over it, and it over a template.

    Example: psenet prune --model timm:mobilenetv2_100 --data DIR --macs 50% --out runs/x
    """
    from psenet.cli.opening import Place, make_console, open_run, read_overrides
    from psenet.errors import InputError
    from psenet.pipeline import finish
    from psenet.report import report_name
    from psenet.result import result_table

    overrides = [*_given(context), *read_overrides(settings or ())]
    chosen = _recipe(recipe, template, trained_in, model, overrides)
    if dry_run:
        forecast(chosen, Place(out=Path(), command=context.obj, trained_in=trained_in, data_workers=data_workers))
        return
    if out is None:
        raise InputError("--out RUN must be given: the folder that the run is to be kept in")
    console = make_console()
    place = Place(
        out=out,
        command=context.obj,  # the arguments as they came; see psenet.cli.main
        resume=resume,
        trained_in=trained_in,
        workers=workers,
        data_workers=data_workers,
    )
    result = finish(open_run(chosen, place, console))
    console.print(result_table(result.record))
    places = {
        "report": out / report_name(chosen.report.language),
        "figures": out / "result.json",
        "model": out / "model",
    }
    for name, path in places.items():
        if path.exists():
            console.print(f"{name + ':':<9}{path}", highlight=False, soft_wrap=True)


def forecast(recipe: "Recipe", place: "Place") -> None:
    """Say how long a run would take; nothing is left behind."""
    from psenet.cli.opening import make_console, make_job
    from psenet.stages.forecast import announce
    from psenet.stages.start import start_run

    job = make_job(recipe, place, make_console())
    with tempfile.TemporaryDirectory(prefix="psenet-") as folder:
        seconds = announce(start_run(job, Path(folder) / "dry", trained_in=place.trained_in))
    price = recipe.report.price_per_hour
    if price is not None:
        amount = f"{sum(seconds.values()) / 3600 * price:.2f} {recipe.report.currency or ''}".strip()
        job.say(f"expected cost: about {amount}, at {price:g} an hour")


def _recipe(
    path: Path | None, template: str | None, source: Path | None, model: str | None, overrides: "list[Override]"
) -> "Recipe":
    from psenet.cli.opening import read_kept_recipe
    from psenet.errors import InputError
    from psenet.recipe import read_recipe

    if source is None:
        return read_recipe(path, template=template, overrides=overrides)
    if path is not None or template is not None:
        raise InputError("--from takes everything from that run; leave --recipe and --template out")
    return read_kept_recipe(source, model, overrides, option="--model")


def _given(context: typer.Context) -> "Iterator[Override]":
    """Yield what the options on the command line say; those that were not given say nothing."""
    from psenet.recipe import Override

    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name, keys in KEYS.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            value = context.params[name]
            plain = str(value) if isinstance(value, Path) else value
            yield from (Override(tuple(key.split(".")), plain, options[name]) for key in keys)
