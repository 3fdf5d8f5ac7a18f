"""The numbers of a table: one row for each server and cell, the median of its rounds. Formats nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from loadtests.results import Results
from loadtests.roofline import StepCosts, cell_roofline
from loadtests.watch import Verdict


@dataclass(frozen=True, slots=True)
class Metric:
    """A number of a cell's summary. `find` gives None where the cell has none."""

    name: str
    find: Callable[[Mapping[str, Any]], float | None]
    is_better_high: bool = False


def _plain(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda summary: summary[name]


def _of(distribution: str, statistic: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda summary: None if summary[distribution] is None else summary[distribution][statistic]


THROUGHPUT = Metric("tok/s", _plain("output_tokens_per_s"), is_better_high=True)
TTFT_P50 = Metric("TTFT p50", _of("ttft_ms", "p50"))
TTFT_P95 = Metric("TTFT p95", _of("ttft_ms", "p95"))
LATENCIES = (
    TTFT_P50,
    TTFT_P95,
    Metric("TTFT p99", _of("ttft_ms", "p99")),
    Metric("ITL p50", _of("itl_ms", "p50")),
    Metric("ITL p99", _of("itl_ms", "p99")),
    Metric("TPOT p50", _of("tpot_ms", "p50")),
    Metric("E2E p50", _of("e2e_ms", "p50")),
    Metric("E2E p95", _of("e2e_ms", "p95")),
)
REQUESTS = Metric("req/s", _plain("requests_per_s"), is_better_high=True)
CLIENT_COST = Metric("client µs/token", _plain("client_us_per_token"))
METRICS = (THROUGHPUT, REQUESTS, *LATENCIES, CLIENT_COST)


@dataclass(frozen=True, slots=True)
class Row:
    """A server in a cell. `values` has every round's numbers by metric, `verdict` is the worst of the rounds.

    `roofline` is the most tokens a second that the machine allows; None where the server's costs are not known.
    """

    server: str
    cell: str
    workload: str
    concurrency: int | None
    rate: float | None
    num_requests: int
    num_failed: int
    num_short: int
    goodput_share: float | None
    other_cores: float | None
    verdict: Verdict
    values: Mapping[str, tuple[float, ...]]
    roofline: float | None = None

    def value(self, metric: Metric) -> float | None:
        """The median of the rounds."""
        rounds = self.values[metric.name]
        return median(rounds) if rounds else None

    @property
    def roofline_share(self) -> float | None:
        """Of the roofline, what was reached."""
        reached = self.value(THROUGHPUT)
        return None if self.roofline is None or reached is None else reached / self.roofline

    def spread(self, metric: Metric) -> tuple[float, float] | None:
        """Lowest and highest round; None where there was one round or none."""
        rounds = self.values[metric.name]
        return (min(rounds), max(rounds)) if len(rounds) > 1 else None


def rows(results: Results) -> list[Row]:
    """In the order in which the cells and servers first ran."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in results.cells:
        groups.setdefault((cell["cell"], cell["server"]), []).append(cell)
    cells = list(dict.fromkeys(cell["cell"] for cell in results.cells))
    servers = list(dict.fromkeys(cell["server"] for cell in results.cells))
    return [
        _row(groups[cell, server], results.step_costs.get(server))
        for cell in cells
        for server in servers
        if (cell, server) in groups
    ]


def _row(rounds: list[Mapping[str, Any]], costs: StepCosts | None) -> Row:
    first = rounds[0]
    summaries = [cell["summary"] for cell in rounds]
    loads = [cell["disturbance"]["load"] or {} for cell in rounds]
    return Row(
        server=first["server"],
        cell=first["cell"],
        workload=first["workload"]["name"],
        concurrency=first["load"]["concurrency"],
        rate=first["load"]["rate"],
        num_requests=sum(summary["num_requests"] for summary in summaries),
        num_failed=sum(summary["num_requests"] - summary["num_succeeded"] for summary in summaries),
        num_short=sum(summary["num_short"] for summary in summaries),
        goodput_share=_median(summary["goodput"]["share"] for summary in summaries if summary["goodput"]),
        other_cores=max((load["other"] for load in loads if load.get("other") is not None), default=None),
        verdict=_worst(Verdict(cell["disturbance"]["verdict"]) for cell in rounds),
        values={metric.name: _known(metric.find(summary) for summary in summaries) for metric in METRICS},
        roofline=None if costs is None else cell_roofline(costs, first),
    )


def _worst(verdicts: Iterable[Verdict]) -> Verdict:
    seen = set(verdicts)
    return next(verdict for verdict in (Verdict.DISTURBED, Verdict.UNVERIFIED, Verdict.CLEAN) if verdict in seen)


def _known(values: Iterable[float | None]) -> tuple[float, ...]:
    return tuple(value for value in values if value is not None)


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return median(known) if known else None
