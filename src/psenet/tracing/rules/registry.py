"""The rule of each op, by name."""

from collections.abc import Callable

from psenet.tracing.call import Rule

RULES: dict[str, Rule] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register the rule of some ops.

    In-place variants (`relu_`) share the rule of the plain op. An op of your own, made with `torch.library`, is named
    as its overload prints: `"mylib.myop.default"`.

    Raises:
        ValueError: An op has a rule already.
    """

    def register(function: Rule) -> Rule:
        for op in ops:
            if op in RULES:
                raise ValueError(f"{op} has a rule already: {RULES[op].__name__}")  # pyright: ignore[reportAttributeAccessIssue]
            RULES[op] = function
        return function

    return register
