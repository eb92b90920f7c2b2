"""Training: one loop, and the strategies that choose which subnets it trains."""

from psenet.training.config import TrainConfig
from psenet.training.curves import EpochRecord, Recorder
from psenet.training.guard import TrainingDivergedError
from psenet.training.plain import train_model
from psenet.training.strategies import Strategy, make_strategy, strategy
from psenet.training.supernet import train_supernet

__all__ = [
    "EpochRecord",
    "Recorder",
    "Strategy",
    "TrainConfig",
    "TrainingDivergedError",
    "make_strategy",
    "strategy",
    "train_model",
    "train_supernet",
]
