"""psenet: make a convolutional network smaller by choosing how many channels each layer keeps.

The way through the package, in the order data flows: `trace` a model to a `WidthSpace`, make a `Supernet`, train it
with `train_supernet`, fit a `Prior` and a `Predictor`, `search` inside a `Budget` with a `SupernetScore`,
`Supernet.extract` the winner. `prune` does all of it.
"""

from psenet import training
from psenet.artifact import load
from psenet.budget import Budget
from psenet.config import PruneConfig
from psenet.errors import InputError
from psenet.evaluate import SupernetScore
from psenet.evolution import search, search_each
from psenet.export import export_model
from psenet.front import search_front
from psenet.history import History
from psenet.importance import order_channels
from psenet.latency import Latency, measure_latency
from psenet.latency_model import LatencyModel
from psenet.pipeline import PruneResult, prune
from psenet.predictor import Predictor
from psenet.prior import Prior
from psenet.reading import trace
from psenet.runners import Runner
from psenet.space import ChannelGroup, Frozen, WidthSpace
from psenet.supernet import Supernet
from psenet.task import Task
from psenet.training import TrainConfig, make_strategy, train_model, train_supernet
from psenet.widths import Widths

__all__ = [
    "Budget",
    "ChannelGroup",
    "Frozen",
    "History",
    "InputError",
    "Latency",
    "LatencyModel",
    "Predictor",
    "Prior",
    "PruneConfig",
    "PruneResult",
    "Runner",
    "Supernet",
    "SupernetScore",
    "Task",
    "TrainConfig",
    "WidthSpace",
    "Widths",
    "export_model",
    "load",
    "make_strategy",
    "measure_latency",
    "order_channels",
    "prune",
    "search",
    "search_each",
    "search_front",
    "trace",
    "train_model",
    "train_supernet",
    "training",
]
