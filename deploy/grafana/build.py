"""Writes the Grafana dashboards in `dashboards/`: `python -m deploy.grafana.build`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deploy.grafana.panels import STACKED, heatmap, mean, now, panel, percentiles, quantile, rate, share, stat

HERE = Path(__file__).resolve().parent
WIDTH = 24


def overview() -> list[dict[str, Any]]:
    return [
        stat("Engine", "min(mosaic_engine_up)", "bool_on_off", "Whether the engine answers.",
             (None, "red"), (1, "green")),
        stat("Running", now("num_requests_running"), "short", "Requests being generated."),
        stat("Waiting", now("num_requests_waiting"), "short", "Requests that wait.", (None, "green"), (10, "orange")),
        stat("Tokens per second", rate("generation_tokens_total"), "short", "Tokens that reach clients."),
        stat(
            "Error budget burn, 1 h", "max(mosaic:slo_errors:burn_rate1h)", "short",
            "1 spends the budget of 0.5 % failed requests exactly; 14.4 spends a month's in two days.",
            (None, "green"), (1, "orange"), (6, "red"),
        ),
        stat(
            "Latency budget burn, 1 h", "max(mosaic:slo_slow:burn_rate1h)", "short",
            "1 spends the budget of 5 % first tokens later than 0.5 s exactly.",
            (None, "green"), (1, "orange"), (3, "red"),
        ),
        panel("First token", percentiles("time_to_first_token_seconds"), "s", "From the request's arrival."),
        panel("Between tokens", percentiles("inter_token_latency_seconds"), "s", "As tokens reach the gateway."),
        panel("Whole request", percentiles("e2e_request_latency_seconds"), "s", "Until the last text is on its way."),
        panel(
            "Tokens", [(rate("generation_tokens_total"), "generated"), (rate("prompt_tokens_total"), "in prompts")],
            "short", "Tokens a second.",
        ),
        panel(
            "Requests ended", [(rate("request_success_total", "finished_reason"), "{{finished_reason}}")], "reqps",
            "By how they ended.", **STACKED,
        ),
        panel(
            "Requests refused",
            [(rate("requests_rejected_total", "reason"), "{{reason}}"),
             (rate("requests_cancelled_total"), "cancelled")],
            "reqps", "Before they began, by error code; and those whose client went away.", **STACKED,
        ),
        panel(
            "Budget burn over four windows",
            [(f"max(mosaic:slo_{what}:burn_rate{w})", f"{what} {w}") for what in ("errors", "slow")
             for w in ("5m", "30m", "1h", "6h")],
            "short", "How fast the budgets are spent; the alerts compare a short and a long window.", width=12,
        ),
        panel(
            "HTTP", [(rate("http_requests_total", "route", "status"), "{{route}} {{status}}")], "reqps",
            "Every HTTP request, by route and status.", width=12,
        ),
    ]  # fmt: skip


PHASES = ("gateway", "queue", "prefill", "decode", "stream")


def latency() -> list[dict[str, Any]]:
    return [
        panel(
            "Where the time goes", [(mean(f"request_{phase}_time_seconds"), phase) for phase in PHASES], "s",
            "The mean request: the phases add up to its whole time.", width=12, **STACKED,
        ),
        panel(
            "Phases, 99th percentile", [(quantile(0.99, f"request_{phase}_time_seconds"), phase) for phase in PHASES],
            "s", "What the slowest wait for. Percentiles do not add up.", width=12,
        ),
        heatmap("First token", "time_to_first_token_seconds", "s", "How many requests took how long."),
        heatmap("Between tokens", "inter_token_latency_seconds", "s", "How many tokens came how long after the last."),
        panel(
            "Time per output token", percentiles("request_time_per_output_token_seconds"), "s",
            "A request's mean time of its tokens after the first.",
        ),
        panel("HTTP", [(quantile(0.99, "http_request_duration_seconds", "route"), "{{route}}")], "s",
              "99th percentile from head to end of the answer, by route."),
        panel("In flight", [(now("num_completions_in_flight", "gateway"), "{{gateway}}")], "short",
              "Completions accepted and not yet answered, by gateway."),
        heatmap("Prompt length", "request_prompt_tokens", "short", "How many prompts had how many tokens."),
        heatmap("Completion length", "request_generation_tokens", "short", "How many completions had how many tokens."),
    ]  # fmt: skip


def engine() -> list[dict[str, Any]]:
    step = "engine_step_duration_seconds"
    return [
        panel(
            "Step time",
            [(quantile(q, step, "kind"), f"p{q * 100:g} {{{{kind}}}}") for q in (0.5, 0.99)],
            "s", "A prefill step absorbs prompts; everybody who decodes in it waits for it.",
        ),
        panel("Batch", [(mean("engine_batch_size"), "requests"), (mean("engine_step_tokens"), "tokens")], "short",
              "Of a step, on average."),
        panel(
            "What the engine does",
            [(rate("engine_forward_seconds_total"), "computes"),
             (f"{rate('engine_step_seconds_total')} - {rate('engine_forward_seconds_total')}", "plans and books"),
             (rate("engine_idle_seconds_total"), "idles")],
            "s", "Seconds of each second, summed over replicas.", **STACKED,
        ),
        panel("Memory blocks", [(now("memory_blocks", "state"), "{{state}}")], "short",
              "In use, kept for prompts that begin alike, or free.", **STACKED),
        panel("Memory used", [("max by (replica) (mosaic_memory_usage_ratio)", "{{replica}}")], "percentunit",
              "Share of the blocks in use."),
        panel("State slots", [(now("state_slots", "state"), "{{state}}")], "short",
              "One for each running request.", **STACKED),
        panel(
            "Prefix cache",
            [(share(rate("prefix_cache_hits_total"), rate("prefix_cache_queries_total")), "hit")],
            "percentunit", "Share of the prompts' tokens that were found and need not be computed.",
        ),
        panel(
            "Tokens computed and saved",
            [(rate("engine_prompt_tokens_total"), "prompt, computed"),
             (rate("engine_generation_tokens_total"), "sampled"),
             (rate("prefix_cache_hits_total"), "saved by the prefix cache")],
            "short", "Tokens a second.",
        ),
        panel(
            "Preemptions",
            [(rate("num_preemptions_total"), "preempted"), (rate("num_resumptions_total"), "resumed"),
             (rate("prefix_cache_evictions_total"), "cached blocks evicted")],
            "ops", "Requests that lost their memory to another, and got it back. Many of them: too little memory.",
        ),
        panel(
            "What the prefix cache holds",
            [(now("prefix_cache_blocks"), "blocks"), (now("prefix_cache_snapshots"), "states"),
             (now("swapped_blocks"), "blocks swapped out")],
            "short", "Blocks that can be found, the states to go on from, and blocks that wait outside.", width=12,
        ),
        panel(
            "Swapped", [(rate("swapped_out_blocks_total"), "out"), (rate("swapped_in_blocks_total"), "back in")],
            "ops", "Blocks a second that leave the memory cache for the second pool, and return.", width=12,
        ),
    ]  # fmt: skip


def replicas() -> list[dict[str, Any]]:
    return [
        stat("Replicas", "max(mosaic_num_engine_replicas)", "short", "Engine replicas that answer.",
             (None, "red"), (1, "green")),
        stat("Gateways", "count(count by (gateway) (mosaic_build_info))", "short", "Gateways that tell of themselves."),
        stat("Busiest", "max(mosaic:engine_busy:ratio_rate5m)", "percentunit",
             "Share of the time that the busiest replica spends in steps.", (None, "green"), (0.9, "orange")),
        stat("Waiting for each replica",
             f"{now('num_requests_waiting')} / clamp_min(max(mosaic_num_engine_replicas), 1)",
             "short", "Above 0 for long, and every replica busy: another one pays.", (None, "green"), (4, "orange")),
        stat("Queue, 90th percentile", quantile(0.9, "request_queue_time_seconds"), "s",
             "What another replica could take away.", (None, "green"), (0.5, "orange")),
        stat("Start-up", "max(sum by (replica) (mosaic_engine_start_up_seconds))", "s",
             "How late a new replica helps, Ray's own time left out."),
        panel("Busy", [("max by (replica) (mosaic:engine_busy:ratio_rate5m)", "{{replica}}")], "percentunit",
              "Share of the time in steps."),
        panel("Running", [(now("num_requests_running", "replica"), "{{replica}}")], "short", "By replica.", **STACKED),
        panel("Waiting", [(now("num_requests_waiting", "replica"), "{{replica}}")], "short", "By replica.", **STACKED),
        panel("Tokens per second", [(rate("engine_generation_tokens_total", "replica"), "{{replica}}")], "short",
              "Sampled, by replica.", **STACKED),
        panel("Replicas",
              [("max(mosaic_num_engine_replicas)", "answer"), ("max(mosaic_num_engine_replicas_wanted)", "wanted")],
              "short", "Fewer than wanted for long: one is lost, or cannot start."),
        panel("Backlog", [("max by (replica) (mosaic_backlog_seconds)", "{{replica}}")], "s",
              "How long full batches take for all that requests have still to get: what autoscaling goes by."),
        panel("Tokens to be computed", [(now("pending_tokens", "state"), "{{state}}")], "short",
              "Of requests that run and that wait, as far as can be expected.", **STACKED),
        panel("Capacity in use", [(rate("engine_work_seconds_total", "replica"), "{{replica}}")], "percentunit",
              "Of what full batches come to; a replica that is busy with a few requests has room for more."),
        panel("Start-up", [("max by (replica, phase) (mosaic_engine_start_up_seconds)", "{{replica}} {{phase}}")], "s",
              "What loading took, by phase."),
        panel("Gateways", [(rate("generation_tokens_total", "gateway"), "{{gateway}}")], "short",
              "Tokens a second through each gateway."),
        panel("Continued elsewhere", [(rate("request_resumptions_total", "gateway"), "{{gateway}}")], "ops",
              "Requests that went on at another replica because theirs was lost, by gateway."),
        panel("Aborted", [(rate("engine_aborted_total", "replica"), "{{replica}}")], "ops",
              "Requests that their clients gave up, by replica."),
    ]  # fmt: skip


def keys() -> list[dict[str, Any]]:
    return [
        panel("Requests", [(rate("key_requests_total", "key"), "{{key}}")], "reqps", "Ended, by API key.", **STACKED),
        panel("Refused", [(rate("key_rejected_total", "key"), "{{key}}")], "reqps",
              "For any reason, by API key.", **STACKED),
        panel("Queue", [(now("queue_depth", "key"), "{{key}}")], "short", "Requests that wait, by API key.", **STACKED),
        panel("Tokens generated", [(rate("key_generation_tokens_total", "key"), "{{key}}")], "short",
              "Tokens a second, by API key.", width=12, **STACKED),
        panel("Prompt tokens", [(rate("key_prompt_tokens_total", "key"), "{{key}}")], "short",
              "Tokens a second, by API key.", width=12, **STACKED),
    ]  # fmt: skip


DASHBOARDS = {
    "overview": ("Tessera: overview", overview),
    "latency": ("Tessera: latency and phases", latency),
    "engine": ("Tessera: engine and memory", engine),
    "replicas": ("Tessera: replicas and autoscaling", replicas),
    "keys": ("Tessera: API keys", keys),
}


def dashboard(name: str) -> dict[str, Any]:
    """One dashboard as Grafana reads it."""
    title, build = DASHBOARDS[name]
    return {
        "uid": f"tessera-{name}",
        "title": title,
        "tags": ["tessera"],
        "timezone": "browser",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "links": [{"type": "dashboards", "tags": ["tessera"], "title": "Tessera", "asDropdown": True}],
        "panels": _placed(build()),
    }


def _placed(panels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Puts panels in rows, from left to right."""
    x = y = height = 0
    for number, item in enumerate(panels, start=1):
        place = item["gridPos"]
        if x + place["w"] > WIDTH:
            x, y, height = 0, y + height, 0
        item["id"] = number
        item["gridPos"] = {"x": x, "y": y, "w": place["w"], "h": place["h"]}
        x, height = x + place["w"], max(height, place["h"])
    return panels


def text(name: str) -> str:
    """The file of a dashboard."""
    return json.dumps(dashboard(name), indent=1) + "\n"


def main() -> None:
    for name in DASHBOARDS:
        (HERE / "dashboards" / f"{name}.json").write_text(text(name), encoding="utf-8")


if __name__ == "__main__":
    main()
