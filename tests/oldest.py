"""What is different with the oldest torch that psenet supports; `make matrix` runs the tests with it."""

import pytest
import torch

IS_OLDEST = tuple(int(part) for part in torch.__version__.split(".")[:2]) <= (2, 11)


def differs(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.xfail(IS_OLDEST, reason=f"torch 2.11: {reason}", strict=True)
