"""From a recipe to a run: what the subcommands that train, search and export have in common."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from psenet.recipe import Override, Recipe
    from psenet.stages.run import Run
    from psenet.stages.start import Job

RECIPE = "recipe.yaml"
"""The resolved recipe in a run directory."""
_EVALUATION_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run lives, and what it may use there."""

    out: Path
    command: str | None
    """The command line, for the record."""
    resume: bool = False
    trained_in: Path | None = None
    """The run whose supernet it takes."""
    workers: int = 1
    """Processes that score candidates."""
    data_workers: int = 0
    """Processes that load data."""


def make_console() -> "Console":
    """Return the terminal; brackets in paths are not styles. Of several processes the main one alone speaks."""
    from rich.console import Console

    from psenet import ranks
    from psenet.training.loop import make_accelerator

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # as torchrun and `accelerate launch` say it
        make_accelerator()
    return Console(markup=False, emoji=False, quiet=not ranks.is_main())


def read_overrides(settings: Sequence[str]) -> "list[Override]":
    """Return what `--set key=value` says, as YAML values.

    Raises:
        InputError: One is not of that form.
    """
    from psenet.errors import InputError
    from psenet.recipe import Override
    from psenet.yaml_text import read_scalar

    overrides = []
    for text in settings:
        key, sign, value = text.partition("=")
        if not (sign and key.strip()):
            raise InputError(f"--set must be KEY=VALUE, such as --set supernet.epochs=50; got {text!r}")
        name = key.strip()
        overrides.append(Override(tuple(name.split(".")), read_scalar(value), f"--set {name}"))
    return overrides


def open_run(recipe: "Recipe", place: Place, console: "Console") -> "Run":
    """Load the data, build the model, and start or continue the run; its recipe is kept in it.

    Raises:
        InputError: Something of it cannot be used.
    """
    from psenet import ranks
    from psenet.stages.start import start_run

    run = start_run(make_job(recipe, place, console), place.out, resume=place.resume, trained_in=place.trained_in)
    ranks.in_main(lambda: keep_recipe(recipe, run.folder.file(RECIPE)))
    return run


def make_job(recipe: "Recipe", place: Place, console: "Console") -> "Job":
    """Load the data and build the model that a recipe names."""
    import torch

    from psenet.data import load_data
    from psenet.logs import check_tensorboard
    from psenet.masking import without_passwords
    from psenet.models import build_model
    from psenet.stages.start import Job

    check_files(recipe)
    if recipe.settings.tensorboard:
        check_tensorboard()  # before any time is spent on loading
    chosen, seed = recipe.data, recipe.settings.seed
    console.print(f"loading {without_passwords(chosen.source)}", highlight=False)
    splits = load_data(
        chosen.source,
        image_size=chosen.image_size,
        seed=seed,
        max_train_images=chosen.max_train_images,
        skip_unreadable=chosen.skip_unreadable,
    )
    sizes = {name: len(getattr(splits, name)) for name in ("train", "calibration", "validation", "test")}
    console.print("images: " + ", ".join(f"{count} {name}" for name, count in sizes.items()), highlight=False)
    torch.manual_seed(seed)
    net = build_model(
        recipe.model.name,
        num_classes=splits.num_classes,
        in_channels=splits.input_shape[0],
        pretrained=recipe.model.pretrained,
        weights=None if recipe.model.weights is None else Path(recipe.model.weights),
    )
    check_classes(net, splits.input_shape, splits.num_classes)
    return Job(
        model=net,
        example_input=torch.zeros(1, *splits.input_shape),
        budget=recipe.budget,
        config=recipe.prune_config(),
        names={"model": recipe.model.name, "data": chosen.source},
        command=place.command,
        workers=place.workers,
        language=recipe.report.language,
        returns=recipe.report,
        say=_teller(console),
        show_progress=console.is_terminal,
        **_loaders(splits, sizes, batch_size=chosen.batch_size, seed=seed, num_workers=place.data_workers),
    )


def _teller(console: "Console") -> Callable[[str], None]:
    return lambda line: console.print(line, highlight=False)


def _loaders(splits: Any, sizes: dict[str, int], *, batch_size: int, seed: int, num_workers: int) -> dict[str, Any]:
    from psenet.data import make_loader

    def plain(name: str, drop_last: bool = False) -> Any:
        part = getattr(splits, name)
        return make_loader(part, batch_size=_EVALUATION_BATCH, shuffle=False, drop_last=drop_last)

    return {
        "train_loader": make_loader(
            splits.train,
            batch_size=batch_size,
            shuffle=True,
            seed=seed,
            drop_last=sizes["train"] % batch_size == 1,  # one image alone has no batch statistics
            num_workers=num_workers,
        ),
        "val_loader": plain("validation"),
        "test_loader": plain("test"),
        "calibration_loader": plain("calibration", drop_last=sizes["calibration"] % _EVALUATION_BATCH == 1),
    }


def check_files(recipe: "Recipe") -> None:
    """Make sure that the files and folders of a recipe are there.

    Raises:
        InputError: Some are not; all are named.
    """
    from psenet.errors import InputError

    problems = []
    if recipe.model.weights is not None and not Path(recipe.model.weights).is_file():
        problems.append(f"there is no weights file {recipe.model.weights}")
    source = recipe.data.source
    if source.startswith(("/", "~", ".")) and not Path(os.path.expanduser(source)).is_dir():
        problems.append(f"there is no data folder {source!r}")
    if problems:
        raise InputError("; ".join(problems))


def check_classes(net: "object", input_shape: tuple[int, int, int], num_classes: int) -> None:
    """Make sure that the model gives one logit per class.

    Raises:
        InputError: It refuses the images, or its output has another shape.
    """
    import torch

    from psenet.errors import InputError

    assert isinstance(net, torch.nn.Module)
    try:
        with torch.no_grad():
            logits = net.eval()(torch.zeros(1, *input_shape))
    except Exception as error:  # the user's forward may raise anything
        raise InputError(f"the model refuses images of shape {input_shape}: {type(error).__name__}: {error}") from error
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (1, num_classes):
        raise InputError(
            f"the data has {num_classes} classes, so the model's output for one image must be of shape "
            f"(1, {num_classes}); got {shape}. Let the factory take num_classes, or give a model for these classes"
        )


# Runs that are there --------------------------------------------------------------------------------------------------


def keep_recipe(recipe: "Recipe", path: Path) -> None:
    """Write the resolved recipe into the run, unless it is there."""
    from psenet.files import write_bytes
    from psenet.recipe_text import plain_text

    if not path.exists():
        write_bytes(path, plain_text(recipe).encode())


def read_kept_recipe(
    run: Path, factory: str | None, overrides: "Sequence[Override]" = (), *, option: str = "--factory"
) -> "Recipe":
    """Return the recipe of a run of the command line, with other values where asked.

    Args:
        run: The run directory.
        factory: The model's `my.module:factory`, as the user names it; a recipe in a folder, perhaps a stranger's, is
            not trusted to import one.
        overrides: What is to be different.
        option: The option that names the factory.

    Raises:
        InputError: There is no such run, it was started from Python, or its model must be named.
    """
    from psenet.errors import InputError
    from psenet.models import check_trusted
    from psenet.recipe import read_recipe

    if not (run / "recipe.json").is_file():
        raise InputError(f"{run} must be a run directory made by psenet; it holds no recipe.json")
    if not (run / RECIPE).is_file():
        raise InputError(
            f"the run in {run} holds no {RECIPE}: runs that were started from Python go on from Python, with "
            "resume=True"
        )
    recipe = read_recipe(run / RECIPE, overrides=overrides)
    check_trusted(recipe.model.name, factory, f"the run in {run}", option=option)
    return recipe


def reopen_run(
    run: Path, *, command: str | None, factory: str | None, workers: int = 1, data_workers: int = 0
) -> "Run":
    """Return a run that is there, with its data and its model."""
    recipe = read_kept_recipe(run, factory)
    place = Place(out=run, command=command, resume=True, workers=workers, data_workers=data_workers)
    return open_run(recipe, place, make_console())


def continue_run(
    run: Path, stage: str, *, command: str | None, factory: str | None, workers: int = 1, data_workers: int = 0
) -> None:
    """Do one stage of a run that is there."""
    from psenet.pipeline import run_stage

    opened = reopen_run(run, command=command, factory=factory, workers=workers, data_workers=data_workers)
    run_stage(opened, stage)
