"""Parts of random networks; all of them keep the samples on axis 0."""

from parts import blocks, layers
from parts.functions import Op
from parts.heads import head
from parts.layers import conv, conv_norm, tied
from parts.made import Made, Maker

__all__ = ["BINARY", "UNARY", "Made", "Maker", "Op", "conv", "conv_norm", "head", "tied"]

BINARY = {
    **{"cat": 4, "add": 5, "subtract": 1, "multiply": 1.5, "gate": 1, "maximum": 0.7, "fused": 0.7},
    **{"add_in_place": 0.7, "stack": 0.1},
}
"""How often two results are joined in which way."""

UNARY: dict[Maker, float] = {
    layers.convolution: 6,
    layers.grouped: 2,
    layers.depthwise: 2,
    layers.transposed: 1,
    layers.transposed_depthwise: 0.5,
    layers.weight_normed: 0.7,
    layers.batch_norm: 2,
    layers.instance_norm: 1,
    layers.group_norm: 1.5,
    layers.channel_norm: 1,
    layers.whole_norm: 0.5,
    layers.act: 2,
    layers.function: 4,
    layers.unknown: 0.3,
    layers.rearranged: 2.5,
    layers.pool: 1.5,
    layers.upsample: 0.6,
    layers.pixel_shuffle: 0.8,
    layers.dropout: 0.5,
    blocks.residual: 2,
    blocks.dense: 1,
    blocks.excite: 1,
    blocks.slide: 0.5,
    blocks.spatial_gate: 0.7,
    blocks.parted: 1,
    blocks.scale: 1,
    blocks.last_mlp: 0.8,
    layers.standardised: 0.7,
}
"""Every maker of a part that reads one result, and how often it is taken."""
