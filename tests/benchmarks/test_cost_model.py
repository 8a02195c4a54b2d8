"""The fit of the cost model finds the constants that made-up times come from."""

import pytest

from experiments.benchmarks import cost_model
from experiments.benchmarks.cost_model import Sample

SIZES = [(size, count) for size in (10**5, 10**7, 10**8) for count in (1, 10, 100)]


def samples_of(fixed_secs, bytes_per_sec, latency_secs, errors=(0.0,)):
    made = cost_model.Constants(fixed_secs, bytes_per_sec, latency_secs)
    return [Sample(*key, made.predict(*key) * (1 + errors[number % len(errors)]))
            for number, key in enumerate(SIZES)]


def test_exact_times_give_back_their_constants():
    found = cost_model.fit(samples_of(5e-5, 2e9, 1e-5))
    assert found.fixed_secs == pytest.approx(5e-5)
    assert found.bytes_per_sec == pytest.approx(2e9)
    assert found.latency_secs == pytest.approx(1e-5)
    assert found.residuals == pytest.approx([0.0] * len(SIZES), abs=1e-9)
    # 50 µs + 4 MB at 2 GB/s + 3 × 10 µs
    assert found.predict(4_000_000, 3) == pytest.approx(2.08e-3)


def test_noise_stays_in_the_residuals():
    found = cost_model.fit(samples_of(5e-5, 2e9, 1e-5, errors=(0.1, -0.1)))
    assert found.bytes_per_sec == pytest.approx(2e9, rel=0.15)
    assert found.latency_secs == pytest.approx(1e-5, rel=0.15)
    assert 0.05 < max(map(abs, found.residuals)) < 0.2


def test_a_fixed_time_below_zero_counts_as_none():
    samples = [Sample(1_000_000, 1, 1e-4), Sample(2_000_000, 1, 3e-4),
               Sample(4_000_000, 2, 7e-4), Sample(4_000_000, 4, 7.2e-4)]
    assert cost_model.fit(samples).fixed_secs == 0
