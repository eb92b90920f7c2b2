"""psenet: make a convolutional network smaller by choosing how many channels each layer keeps."""

from psenet.errors import InputError
from psenet.reading import trace
from psenet.space import ChannelGroup, Frozen, WidthSpace
from psenet.supernet import Supernet
from psenet.widths import Widths

__all__ = ["ChannelGroup", "Frozen", "InputError", "Supernet", "WidthSpace", "Widths", "trace"]
