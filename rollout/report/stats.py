"""Means with 95% intervals, of one set of returns and of the difference between two. Pure; no SciPy.

An interval says how far the mean of *more episodes of the same kind* may lie from the one seen. It is None
where the data cannot say: fewer than two episodes, or returns that are all equal and not of the success
kind (then the spread was not seen yet, and an interval of width 0 would be a lie).

Which interval: returns that are all 0 or 1 are success rates, with Wilson's interval (Wilson 1927), which
keeps its coverage at few episodes and near 0 and 1, where the normal one collapses; a difference of two
success rates has Newcombe's hybrid of two Wilson intervals (Newcombe 1998, method 10). Everything else has
Student's t, and a difference Welch's t with its degrees of freedom rounded down. Episodes that two runs
share (same task and seed) are compared in pairs, which takes the difficulty of the task out of the
difference.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "Difference",
    "Estimate",
    "difference",
    "estimate",
    "paired_difference",
    "running_estimates",
    "t_quantile",
]

Z_95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and how sure it is.

    Attributes:
        mean: The mean.
        low: Lower end of its 95% interval; None when the data cannot say.
        high: Upper end.
        count: Number of values.
        method: "wilson" or "t"; empty without an interval.
    """

    mean: float
    low: float | None
    high: float | None
    count: int
    method: str


@dataclass(frozen=True, slots=True)
class Difference:
    """Second mean minus first, with its 95% interval (None when the data cannot say).

    Attributes:
        value: The difference of the means.
        low: Lower end of its interval.
        high: Upper end.
        count: Pairs, for a paired difference; otherwise values of both sides together.
        method: "paired t", "welch" or "newcombe"; empty without an interval.
    """

    value: float
    low: float | None
    high: float | None
    count: int
    method: str

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of values and its interval; None without values."""
    if not values:
        return None
    count = len(values)
    variance = statistics.variance(values) if count > 1 else 0.0
    return _from_moments(statistics.fmean(values), variance, count, _are_successes(values))


def running_estimates(values: Sequence[float], counts: Sequence[int]) -> list[Estimate]:
    """The estimate of the first n values for each n in `counts`, in one pass.

    Args:
        values: The values in their order.
        counts: Ascending, each from 1 to `len(values)`.
    """
    wanted = iter(counts)
    next_count = next(wanted, None)
    mean = squares = 0.0  # Welford's running mean and sum of squared deviations
    are_successes = True
    estimates: list[Estimate] = []
    for count, value in enumerate(values, 1):
        delta = value - mean
        mean += delta / count
        squares += delta * (value - mean)
        are_successes = are_successes and _are_successes((value,))
        if count == next_count:
            variance = squares / (count - 1) if count > 1 else 0.0
            estimates.append(_from_moments(mean, variance, count, are_successes))
            next_count = next(wanted, None)
    return estimates


def difference(first: Sequence[float], second: Sequence[float]) -> Difference | None:
    """How much higher the second mean is, from independent episodes; None when a side is empty."""
    if not first or not second:
        return None
    mean_1, mean_2 = statistics.fmean(first), statistics.fmean(second)
    value, count = mean_2 - mean_1, len(first) + len(second)
    if len(first) < 2 or len(second) < 2:
        return Difference(value, None, None, count, "")
    if _are_successes(first) and _are_successes(second):
        low_1, high_1 = _wilson(mean_1, len(first))
        low_2, high_2 = _wilson(mean_2, len(second))
        low = value - math.hypot(mean_2 - low_2, high_1 - mean_1)
        high = value + math.hypot(high_2 - mean_2, mean_1 - low_1)
        return Difference(value, low, high, count, "newcombe")
    part_1 = statistics.variance(first) / len(first)
    part_2 = statistics.variance(second) / len(second)
    if part_1 + part_2 == 0:
        return Difference(value, None, None, count, "")
    freedom = (part_1 + part_2) ** 2 / (
        part_1**2 / (len(first) - 1) + part_2**2 / (len(second) - 1)
    )  # Welch and Satterthwaite
    half = t_quantile(max(1, math.floor(freedom))) * math.sqrt(part_1 + part_2)
    return Difference(value, value - half, value + half, count, "welch")


def paired_difference(first: Mapping[object, float], second: Mapping[object, float]) -> Difference | None:
    """How much higher the second mean is over the keys that both have; None without a common key."""
    keys = [key for key in first if key in second]
    if not keys:
        return None
    gains = [second[key] - first[key] for key in keys]
    value = statistics.fmean(gains)
    if len(gains) < 2 or (error := statistics.stdev(gains) / math.sqrt(len(gains))) == 0:
        return Difference(value, None, None, len(gains), "")
    half = t_quantile(len(gains) - 1) * error
    return Difference(value, value - half, value + half, len(gains), "paired t")


@functools.cache
def t_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t, which bounds a two-sided 95% interval.

    Raises:
        ValueError: `freedom` is below 1.
    """
    if freedom < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {freedom}")
    if freedom > 100:  # Abramowitz and Stegun, 26.7.5: the error is below 1e-8 here
        z, v = Z_95, freedom
        return (
            z
            + (z**3 + z) / (4 * v)
            + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        )
    low, high = 0.0, 13.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_two_sided(middle, freedom) < 0.95 else (low, middle)
    return high


def _t_two_sided(t: float, freedom: int) -> float:
    """P(|T| < t), by the finite series for whole degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(theta), math.sin(theta)
    if freedom % 2:
        term = total = cosine if freedom > 1 else 0.0
        for k in range(3, freedom - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        return 2 / math.pi * (theta + sine * total)
    term = total = 1.0
    for k in range(2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return sine * total


def _from_moments(mean: float, variance: float, count: int, are_successes: bool) -> Estimate:
    if count < 2:
        return Estimate(mean, None, None, count, "")
    if are_successes:
        low, high = _wilson(mean, count)
        return Estimate(mean, low, high, count, "wilson")
    if variance == 0:
        return Estimate(mean, None, None, count, "")
    half = t_quantile(count - 1) * math.sqrt(variance / count)
    return Estimate(mean, mean - half, mean + half, count, "t")


def _are_successes(values: Sequence[float]) -> bool:
    return all(value in (0.0, 1.0) for value in values)


def _wilson(rate: float, count: int) -> tuple[float, float]:
    scale = 1 + Z_95**2 / count
    centre = (rate + Z_95**2 / (2 * count)) / scale
    half = Z_95 / scale * math.sqrt(rate * (1 - rate) / count + Z_95**2 / (4 * count**2))
    return max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half))
