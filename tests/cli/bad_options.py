"""Mistakes on the command line, and in what it says of budgets."""

from pathlib import Path

from bad_input import MODEL, START, Case

_INSPECT = f"inspect {MODEL} --in-channels 1 --num-classes 10 --image-size 8"
_BENCH = f"bench {MODEL} --channels 1 --num-classes 10 --image-size 8 --runs 3"


def _option(name: str, given: str, *says: str) -> Case:
    return Case(name=name, command=f"{START} {given}", says=says)


COMMANDS = (
    Case(name="no such command", command="purne", says=("No such command 'purne'",)),
    Case(name="no such option", command="prune --mcas 50%", says=("No such option: --mcas",)),
    Case(name="debug behind the command", command="prune --debug", says=("No such option: --debug",)),
    Case(name="an argument is missing", command="inspect", says=("Missing argument",)),
    Case(name="an argument too many", command="env now", says=("Got unexpected extra argument",)),
    Case(name="compare without data", command="compare run", says=("Missing option '--data'",)),
    Case(
        name="nothing but an output folder",
        command="prune --out run",
        says=(
            "the recipe cannot be used:",
            "model.name must be given",
            "data.source must be given",
            "a budget needs at",
        ),
    ),
    Case(
        name="no output folder",
        command=f"prune --model {MODEL} --data digits --macs 50%",
        says=("--out RUN must be given: the folder that the run is to be kept in",),
    ),
    Case(
        name="two sources of settings",
        command="prune --from run --template pilot --out other",
        says=("--from takes everything from that run; leave --recipe and --template out",),
    ),
    Case(
        name="another budget in the same folder",
        command="search run --macs 30%",
        says=("another budget, or other settings, are another run", "give its folder, --out RUN"),
    ),
    Case(
        name="a layer that is not there",
        command=f"{_INSPECT} --why conv9",
        says=("--why: no layer with channels matches 'conv9'",),
    ),
    Case(
        name="a layer to exclude that is not there",
        command=f"{_INSPECT} --exclude conv9",
        says=("exclude: no elastic layer matches ['conv9']; layers are named like ['conv1', 'bn1',",),
    ),
    Case(
        name="a module not to read that is not there",
        command=f"{_INSPECT} --opaque attention",
        says=("opaque: no module matches ['attention']; modules are named like ['conv1',",),
    ),
    Case(
        name="an engine that is not there",
        command=f"{_BENCH} --engine tensorrt",
        says=("engine must be one of eager, compile, onnxruntime; got 'tensorrt'",),
    ),
    Case(
        name="a share of channels that is none",
        command=f"{_BENCH} --keep half",
        says=("--keep must be a share of the channels, such as 50% or 0.5; got 'half'",),
    ),
    Case(
        name="figures to be written into a folder",
        command=f"{_BENCH} --out figures",
        prepare=lambda: Path("figures").mkdir(),
        says=("figures must be a file to write; it is a folder: give a name inside it",),
    ),
    Case(
        name="figures to be written below a file",
        command="compare run --data digits --out notes/compare.json",
        files={"notes": "mine"},
        says=("notes/compare.json cannot be written: ", "notes is a file; give another path"),
    ),
    Case(
        name="no such split",
        command="compare run --data digits --split train",
        says=("--split must be validation or test; got 'train'",),
    ),
    Case(
        name="a run compared with itself",
        command="compare run ./run --data digits",
        says=("a run cannot be compared with itself; given twice: run",),
    ),
    Case(
        name="a recipe to be written over a file",
        command="init recipe.yaml",
        files={"recipe.yaml": "mine"},
        says=("recipe.yaml is there already; give another name, or --force to write over it",),
    ),
    Case(
        name="a recipe to be written into a folder",
        command="init recipes --force",
        prepare=lambda: Path("recipes").mkdir(),
        says=("recipes must be a file to write; it is a folder",),
    ),
    Case(
        name="a setting without value",
        command=f"{START} --set supernet.epochs",
        says=("--set must be KEY=VALUE, such as --set supernet.epochs=50; got 'supernet.epochs'",),
    ),
    Case(
        name="a setting that is no YAML",
        command=f"{START} --set supernet.epochs=[1",
        says=("'[1' is no YAML value: expected ',' or ']'",),
    ),
    Case(
        name="a setting nested without end",
        command=f"{START} --set seed={'[' * 3000}",
        says=("is no YAML value: maximum recursion depth exceeded",),
    ),
    Case(
        name="an output folder whose name is too long",
        command=f"{START}{'x' * 300}",
        says=("the output folder runxxx", "cannot be written: File name too long; give another path"),
    ),
    Case(
        name="an output folder that is a file",
        command=START,
        files={"run": "mine"},
        says=("the output folder run is a file; give another path",),
    ),
    Case(
        name="an output folder below a file",
        command=f"{START}/below",
        files={"run": "mine"},
        says=("the output folder run/below cannot be written: ",),
    ),
)

NUMBERS = (
    _option("a seed below zero", "--seed -1", "Invalid value for '--seed'"),
    _option(
        "a seed beyond 32 bits",
        "--seed 99999999999999999999",
        "--seed: seed must be an integer of at least 0 and at most 4294967295; got 99999999999999999999",
    ),
    _option("a seed below zero in a setting", "--set seed=-1", "--set seed: seed must be an integer of at least 0"),
    _option("a seed that is true", "--set seed=true", "--set seed: seed: must be a number; got true"),
    _option("a seed with a fraction", "--set seed=1.5", "seed: input should be a valid integer, got a number with a"),
    _option("a batch of one", "--batch-size 1", "Invalid value for '--batch-size'"),
    _option(
        "a batch beyond all memory",
        "--batch-size 99999999999999999999",
        "data: batch_size must be at least 2 and at most 2147483647; got 99999999999999999999",
    ),
    _option("images of seven pixels", "--image-size 7", "Invalid value for '--image-size'"),
    _option("fewer images than classes", "--max-train-images 3", "at least one per class, 10 here; got a maximum of 3"),
    _option("no evaluations", "--evaluations 0", "Invalid value for '--evaluations'"),
    _option(
        "no evaluations in a setting", "--set num_evaluations=0", "num_evaluations must be an integer of at least 1"
    ),
    _option(
        "a front of less than nothing", "--set num_front_evaluations=-1", "num_front_evaluations must be an integer"
    ),
    _option("no epochs of the baseline", "--baseline-epochs 0", "Invalid value for '--baseline-epochs'"),
    _option("epochs in words", "--supernet-epochs many", "Invalid value for '--supernet-epochs'"),
    _option(
        "epochs without end", "--set supernet.epochs=.inf", "supernet.epochs: input should be a finite number; got inf"
    ),
    _option("epochs below zero", "--set supernet.epochs=-1", "epochs must be an integer of at least 0; got -1"),
    _option("widths that are multiples of zero", "--divisor 0", "Invalid value for '--divisor'"),
    _option("a divisor above all widths", "--divisor 99999", "no width that could vary", "no smaller width is allowed"),
    _option("a smallest share of zero", "--min-ratio 0", "min_ratio must be above 0 and at most 1; got 0.0"),
    _option(
        "a smallest share that is no number", "--min-ratio nan", "min_ratio must be above 0 and at most 1; got nan"
    ),
    _option("no subnets in a step", "--set num_subnets=0", "num_subnets must be an integer of at least 1; got 0"),
    _option(
        "a learning rate of zero", "--baseline-lr 0", "--baseline-lr: ", "learning_rate must be above 0 and finite"
    ),
    _option("an infinite learning rate", "--supernet-lr inf", "learning_rate must be above 0 and finite; got inf"),
    _option(
        "a learning rate that is no number", "--finetune-lr nan", "learning_rate must be above 0 and finite; got nan"
    ),
    _option("an overflowing learning rate", "--baseline-lr 1e999", "learning_rate must be above 0 and finite; got inf"),
    _option("a weight decay below zero", "--weight-decay -1", "weight_decay must be at least 0 and finite; got -1.0"),
    _option("an infinite weight decay", "--weight-decay inf", "weight_decay must be at least 0 and finite; got inf"),
    _option("momentum of one", "--set supernet.momentum=1", "momentum must be at least 0 and below 1; got 1.0"),
    _option(
        "warm-up that is no number", "--set supernet.warmup_ratio=.nan", "warmup_ratio must be at least 0 and below 1"
    ),
    _option(
        "labels smoothed away", "--set baseline.label_smoothing=1", "label_smoothing must be at least 0 and below 1"
    ),
    _option("distillation above one", "--distill 1.5", "distill_weight must be between 0 and 1; got 1.5"),
    _option(
        "an infinite temperature",
        "--set finetune.distill_temperature=.inf",
        "--set finetune.distill_temperature: ",
        "distill_temperature must be above 0 and finite; got inf",
    ),
    _option(
        "an unknown optimizer", "--optimizer lion", "baseline.optimizer: input should be 'sgd' or 'adamw'; got 'lion'"
    ),
    _option("an unknown precision", "--mixed-precision fp8", "mixed_precision: input should be 'no', 'fp16' or 'bf16'"),
    _option("an unknown strategy", "--strategy bilaterol", "unknown strategy 'bilaterol'; there are ['bilateral', "),
    _option("an unknown template", "--template turbo", "template must be one of pilot, full; got 'turbo'"),
    _option("no processes", "--workers 0", "Invalid value for '--workers'"),
    _option("less than no processes", "--data-workers -1", "Invalid value for '--data-workers'"),
    _option(
        "a device of another kind", "--latency-device tpu", "latency: device must be 'cpu' or a CUDA device; got 'tpu'"
    ),
    _option(
        "a GPU that is not there",
        "--latency-device cuda:99",
        "device 'cuda:99' is not available: torch sees",
        "use 'cpu'",
    ),
    _option("no threads", "--set latency.num_threads=0", "latency: num_threads must be at least 1; got 0"),
    _option("a pass without samples", "--set latency.batch_size=0", "latency: batch_size must be at least 1; got 0"),
    Case(
        name="a price that is no number",
        command="report run --price-per-hour nan",
        files={"run/recipe.json": "{}"},
        says=("price_per_hour must be a number of at least 0; got nan",),
        leaves=("recipe.json",),
    ),
    Case(
        name="a report in a language that it is not written in",
        command="report run --lang fr",
        files={"run/recipe.json": "{}"},
        says=("the report's language must be one of en, ja; got 'fr'",),
        leaves=("recipe.json",),
    ),
    Case(
        name="a ranking of too few subnets",
        command="report run --verify-ranking 2",
        says=("Invalid value for '--verify-ranking'",),
    ),
)

BUDGETS = (
    _option(
        "a letter for a digit", "--macs 5O%", "the budget's macs must be a positive number with a unit", "got '5O%'"
    ),
    _option(
        "more than everything", "--macs 150%", "macs must be above 0% and at most 100% of the full model", "got '150%'"
    ),
    _option("nothing at all", "--macs 0", "macs must be a positive number, such as 300M", "got '0'"),
    _option("less than nothing", "--macs=-5M", "macs must be a positive number", "got '-5M'"),
    _option("an empty budget", "--macs ''", "macs must be a positive number with a unit or a percentage", "got ''"),
    _option("a budget that is no number", "--macs nan%", "macs must be a positive number with a unit", "got 'nan%'"),
    _option(
        "two budgets malformed",
        "--macs 300X --params '2 apples'",
        "got '300X'; the budget's params must be",
        "got '2 apples'",
    ),
    _option("a unit of another kind", "--memory '4 ms'", "memory must be a positive number with a unit", "got '4 ms'"),
    _option(
        "an infinite latency", "--latency-ms inf", "latency_ms must be a positive number", "4 ms, 0.5 s", "got 'inf'"
    ),
    _option(
        "an infinite budget in a setting",
        "--set budget.macs=.inf",
        "--set budget.macs: budget.macs: must be a finite number or a text such as 50%; got inf",
    ),
    _option("a budget that is true", "--set budget.macs=true", "budget.macs: must be a number; got true"),
    _option(
        "a list of budgets", "--set budget.macs=[1,2]", "must be a finite number or a text such as 50%; got [1, 2]"
    ),
    _option(
        "above the full model", "--macs 1G", "macs='1G' is above the full model's 4.476M MACs (4475520)", "give less"
    ),
    _option(
        "two budgets out of reach",
        "--macs 1% --params 1k",
        "macs='1%' is 44755 and cannot be reached: the smallest reachable is ",
        "; params='1k' is 1000 and cannot be reached: the smallest reachable is ",
        ". Raise the limit",
    ),
    _option(
        "budgets of which one is out of reach",
        "--macs 90% --memory 1kB",
        "the budget does not fit this model: memory='1kB' is 1000 and cannot be reached",
    ),
    Case(
        name="no budget",
        command=f"prune --model {MODEL} --data digits --out run",
        says=("a budget needs at least one limit: set macs, params, memory or latency_ms",),
    ),
)
