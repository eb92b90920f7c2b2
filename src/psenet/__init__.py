"""psenet: make a convolutional network smaller by choosing how many channels each layer keeps."""

from psenet.space import ChannelGroup, Frozen, WidthSpace
from psenet.widths import Widths

__all__ = ["ChannelGroup", "Frozen", "WidthSpace", "Widths"]
