import pytest
import torch
from torch import nn

from psenet import latency
from psenet.errors import InputError
from psenet.latency import Latency, measure_latency
from psenet.runners import Runner


class _Clock:
    """A clock that only modules advance, so that every measurement is known beforehand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class _Takes(nn.Module):
    """Takes `times_ms` of the clock, one after the other (the last for ever), and notes each pass in `calls`."""

    def __init__(self, name: str, clock: _Clock, times_ms: list[float], calls: list[str]) -> None:
        super().__init__()
        self.name, self.clock, self.times_ms, self.calls = name, clock, times_ms, calls
        self.num_passes = 0
        self.modes: set[tuple[bool, bool]] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.seconds += self.times_ms[min(self.num_passes, len(self.times_ms) - 1)] / 1e3
        self.num_passes += 1
        self.calls.append(self.name)
        self.modes.add((self.training, torch.is_inference_mode_enabled()))
        return x


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    fake = _Clock()
    monkeypatch.setattr(latency, "perf_counter", fake)
    return fake


def test_median_and_quartiles_are_of_the_measurements_after_warmup(clock: _Clock):
    module = _Takes("a", clock, [100.0, 100.0, 5.0, 1.0, 3.0, 2.0, 4.0], [])
    result = measure_latency({"a": module}, torch.zeros(1), num_runs=5, warmup=2)["a"]
    assert (result.median_ms, result.q1_ms, result.q3_ms, result.num_runs) == pytest.approx((3.0, 2.0, 4.0, 5))


def test_modules_take_turns_in_a_rotating_order(clock: _Clock):
    calls: list[str] = []
    modules = {name: _Takes(name, clock, [4.0], calls) for name in "abc"}
    measure_latency(modules, torch.zeros(1), num_runs=4, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"


def test_a_short_pass_is_repeated_until_a_measurement_lasts_two_milliseconds(clock: _Clock):
    calls: list[str] = []
    modules = {"short": _Takes("s", clock, [0.3], calls), "long": _Takes("l", clock, [1.0], calls)}
    result = measure_latency(modules, torch.zeros(1), num_runs=3, warmup=2)
    assert calls.count("s") == 2 + 3 * 7  # 7 x 0.3 ms is the first beyond 2 ms
    assert calls.count("l") == 2 + 3
    assert result["short"].median_ms == pytest.approx(0.3) and result["long"].median_ms == pytest.approx(1.0)


def test_a_pass_that_the_clock_cannot_see_ends(clock: _Clock):
    calls: list[str] = []
    result = measure_latency({"a": _Takes("a", clock, [0.0], calls)}, torch.zeros(1), num_runs=3, warmup=1)
    assert result["a"] == Latency(0.0, 0.0, 0.0, 3) and len(calls) == 1 + 3 * 2000


def test_modules_run_in_eval_and_inference_mode_and_get_their_flags_back(clock: _Clock):
    module = _Takes("a", clock, [4.0], [])
    outer = nn.Sequential(module, nn.Identity().eval())
    measure_latency({"a": outer}, torch.zeros(1), num_runs=3, warmup=1)
    assert module.modes == {(False, True)}
    assert [part.training for part in outer.modules()] == [True, True, False]


def test_the_thread_count_is_set_for_the_measurement_only(clock: _Clock):
    seen: set[int] = set()
    module = _Takes("a", clock, [4.0], [])
    module.register_forward_hook(lambda *_: seen.add(torch.get_num_threads()))
    before = torch.get_num_threads()
    other = before + 1
    measure_latency({"a": module}, torch.zeros(1), num_runs=3, warmup=1, runner=Runner(num_threads=other))
    assert seen == {other} and torch.get_num_threads() == before


def test_the_thread_count_and_flags_come_back_when_a_module_fails():
    module = nn.Linear(3, 3)
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measure_latency({"a": module}, torch.zeros(1, 5), runner=Runner(num_threads=before + 1))
    assert torch.get_num_threads() == before and module.training


def test_real_passes_take_time_and_several_inputs_are_passed_on():
    class Product(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x @ y

    small, large = (torch.ones(size, size) for size in (8, 400))
    runs = {
        size: measure_latency({"product": Product()}, (x, x), runner=Runner(batch_size=len(x)), num_runs=5, warmup=2)
        for size, x in (("small", small), ("large", large))
    }
    small_ms, large_ms = runs["small"]["product"], runs["large"]["product"]
    assert 0 < small_ms.q1_ms <= small_ms.median_ms <= small_ms.q3_ms
    assert large_ms.median_ms > 5 * small_ms.median_ms  # 125,000 times the arithmetic


def test_numbers_that_are_too_small_are_named_together():
    with pytest.raises(InputError, match="num_runs must be at least 3; got 2; warmup must be at least 1; got 0"):
        measure_latency({"a": nn.Identity()}, torch.zeros(1), num_runs=2, warmup=0)


def test_nothing_to_measure_is_refused():
    with pytest.raises(InputError, match="at least one module"):
        measure_latency({}, torch.zeros(1))


def test_a_module_that_cannot_be_measured_is_named():
    modules = {"here": nn.Linear(1, 1), "there": nn.Linear(1, 1, device="meta")}
    with pytest.raises(InputError, match="module 'there' cannot be .* must be on cpu; it is on meta: move it first"):
        measure_latency(modules, torch.zeros(1, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_passes_are_timed_on_the_device():
    x = torch.ones(4096, 4096)
    slow, fast = nn.Linear(4096, 4096).cuda(), nn.Identity()
    result = measure_latency({"slow": slow, "fast": fast}, x, runner=Runner(device="cuda", batch_size=4096), num_runs=5)
    assert result["slow"].median_ms > 5 * result["fast"].median_ms > 0
