"""What each ATen op does to channels: one small rule per op, one file per family.

A rule takes a `Call` and returns the `Value` of the op's output, or a tuple of them. To add one, decorate a function
with the names of the ops it covers:

    @rule("mylib.scale.default")
    def scale(call: Call) -> Value:
        value = call.value(call["x"])
        return call.output(value.ids, zero=value.zero)
"""

from psenet.tracing.rules import arrangement, elementwise, layers, norms, space
from psenet.tracing.rules.registry import RULES, rule

__all__ = ["RULES", "arrangement", "elementwise", "layers", "norms", "rule", "space"]
