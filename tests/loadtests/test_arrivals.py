import statistics
from itertools import islice, pairwise

from loadtests.arrivals import poisson_arrivals


def test_the_same_seed_gives_the_same_arrivals() -> None:
    first, second, other = (list(islice(poisson_arrivals(5.0, seed), 100)) for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_arrivals_come_at_the_rate_with_the_spread_of_a_poisson_process() -> None:
    gaps = [after - before for before, after in pairwise([0.0, *islice(poisson_arrivals(4.0, 0), 20_000)])]
    assert min(gaps) > 0
    assert abs(statistics.fmean(gaps) - 0.25) < 0.01
    assert abs(statistics.stdev(gaps) - 0.25) < 0.01
