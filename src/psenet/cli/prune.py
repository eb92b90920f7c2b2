"""`psenet prune`: the whole way from a model to a smaller one."""

from pathlib import Path
from typing import Annotated

import typer

Count = Annotated[int, typer.Option(min=1)]


def prune(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="timm:NAME, torchvision:NAME or my.module:factory.")],
    data: Annotated[str, typer.Option(help="`digits`, an image folder, or a name of timm's dataset factory.")],
    out: Annotated[Path, typer.Option(help="The run directory.")],
    macs: Annotated[str | None, typer.Option(help="Budget of MACs: 50%, 300M.")] = None,
    params: Annotated[str | None, typer.Option(help="Budget of parameters: 50%, 2M.")] = None,
    memory: Annotated[str | None, typer.Option(help="Budget of peak activation memory: 50%, 4MB.")] = None,
    latency_ms: Annotated[str | None, typer.Option(help="Budget of measured latency: 4, 4ms, 50%.")] = None,
    latency_engine: Annotated[str, typer.Option(help="What runs it: eager, compile or onnxruntime.")] = "eager",
    latency_device: Annotated[str, typer.Option(help="Where: cpu, cuda, cuda:1, ...")] = "cpu",
    latency_threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's if not given.")] = None,
    latency_batch: Annotated[int, typer.Option(min=1, help="Samples in one pass.")] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, or start it.")] = False,
    weights: Annotated[Path | None, typer.Option(help="Trained weights of the model (.safetensors).")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Take timm's pretrained weights.")] = False,
    image_size: Annotated[int | None, typer.Option(min=8, help="Derived from the data if not given.")] = None,
    batch_size: Annotated[int, typer.Option(min=2)] = 128,
    baseline_epochs: Annotated[int, typer.Option(min=1, help="Without trained weights only.")] = 30,
    supernet_epochs: Annotated[int, typer.Option(min=1)] = 30,
    finetune_epochs: Annotated[int, typer.Option(min=0)] = 10,
    evaluations: Annotated[int, typer.Option(min=1, help="Candidates that the search scores.")] = 100,
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
    workers: Annotated[int, typer.Option(min=1, help="Processes that score candidates.")] = 1,
    data_workers: Annotated[int, typer.Option(min=0, help="Processes that load data.")] = 0,
) -> None:
    """Prune a model to a budget: train, search, fine-tune, export, compare.

    Example: psenet prune --model timm:mobilenetv2_100 --data DIR --macs 50% --out runs/x
    """
    import torch
    from rich.console import Console

    from psenet.budget import Budget
    from psenet.config import PruneConfig
    from psenet.data import load_data, make_loader
    from psenet.models import build_model
    from psenet.pipeline import prune as run_pipeline
    from psenet.result import result_table
    from psenet.runners import Runner
    from psenet.training.config import TrainConfig

    console = Console(markup=False, emoji=False)  # brackets in paths are not styles
    budget = Budget(macs=macs, params=params, memory=memory, latency_ms=latency_ms)

    def training(epochs: int, learning_rate: float, distill_weight: float = 0.0) -> TrainConfig:
        return TrainConfig(
            epochs=epochs,
            learning_rate=learning_rate,
            optimizer=optimizer,  # pyright: ignore[reportArgumentType]
            weight_decay=weight_decay,
            distill_weight=distill_weight,
            mixed_precision=mixed_precision,  # pyright: ignore[reportArgumentType]
        )

    config = PruneConfig(
        baseline=training(baseline_epochs, baseline_lr),
        supernet=training(supernet_epochs, supernet_lr),
        finetune=training(finetune_epochs, finetune_lr, distill),
        trained=pretrained or weights is not None,
        strategy=strategy,
        num_subnets=num_subnets,
        focus=focus,
        compiled=compiled,
        num_evaluations=evaluations,
        divisor=divisor,
        min_ratio=min_ratio,
        exclude=tuple(exclude or ()),
        opaque=tuple(opaque or ()),
        latency=Runner(
            engine=latency_engine,
            device=latency_device,
            num_threads=latency_threads,
            batch_size=latency_batch,
        ),
        seed=seed,
    )
    console.print(f"loading {data}", highlight=False)
    splits = load_data(
        data, image_size=image_size, seed=seed, max_train_images=max_train_images, skip_unreadable=skip_unreadable
    )
    sizes = {name: len(getattr(splits, name)) for name in ("train", "calibration", "validation", "test")}
    console.print("images: " + ", ".join(f"{count} {name}" for name, count in sizes.items()), highlight=False)
    torch.manual_seed(seed)
    net = build_model(
        model, num_classes=splits.num_classes, in_channels=splits.input_shape[0], pretrained=pretrained, weights=weights
    )
    check_classes(net, splits.input_shape, splits.num_classes)
    result = run_pipeline(
        net,
        torch.zeros(1, *splits.input_shape),
        make_loader(
            splits.train,
            batch_size=batch_size,
            shuffle=True,
            seed=seed,
            drop_last=sizes["train"] % batch_size == 1,  # one image alone has no batch statistics
            num_workers=data_workers,
        ),
        make_loader(splits.validation, batch_size=256, shuffle=False),
        budget=budget,
        test_loader=make_loader(splits.test, batch_size=256, shuffle=False),
        calibration_loader=make_loader(
            splits.calibration, batch_size=256, shuffle=False, drop_last=sizes["calibration"] % 256 == 1
        ),
        out=out,
        config=config,
        resume=resume,
        workers=workers,
        description={"model": model, "data": data},
        command=context.obj,  # the arguments as they came; see psenet.cli.main
        say=lambda line: console.print(line, highlight=False),
        show_progress=console.is_terminal,
    )
    console.print(result_table(result.record))
    places = {"report": out / "report.html", "figures": out / "result.json", "model": out / "model"}
    for name, path in places.items():
        if path.exists():
            console.print(f"{name + ':':<9}{path}", highlight=False, soft_wrap=True)


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
