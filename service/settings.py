"""Every option a user can set, declared once: name, type, default, limits, help. Knows no engine, gateway or Ray.

A value is taken from the command line, else from `TESSERA_<NAME>` in the environment, else from the file given with
`--config`, else from the default below.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.autoscaling import Scaling
from service.config import DType, EngineConfig, KernelName, Quantization, Routing
from service.errors import UsageError
from service.gateway.settings import GatewaySettings
from service.logs import LogFormat
from service.values import Bytes, Secrets, Words

DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "model" / "pretrained" / "llama-tales-mosaic-10m"
ENV_PREFIX = "TESSERA_"

# What no message may show.
_SECRET = {"api_key"}


def option(default: Any, group: str, description: str, **limits: Any) -> Any:
    """A field of the settings, with the help panel it is shown in."""
    metavar = limits.pop("metavar", None)
    extra = {"group": group} | ({"metavar": metavar} if metavar else {})
    return Field(default, description=description, json_schema_extra=extra, **limits)


class EngineSettings(BaseModel):
    """What to load, and onto what."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: Path = option(DEFAULT_MODEL, "Model", "Directory of a converted checkpoint.", metavar="DIR")
    model_fingerprint: str = option(
        "",
        "Model",
        "First digits of the fingerprint that the checkpoint has to have, 12 or more, as in `system_fingerprint`.",
        pattern=r"^([0-9a-f]{12,64})?$",
        metavar="DIGITS",
    )
    device: str | None = option(
        None, "Model", "cpu, cuda or cuda:N. Default: cuda where --num-gpus is above 0, else cpu.", metavar="NAME"
    )
    dtype: DType = option("auto", "Model", "Type of the weights. auto: bfloat16 where that is fast, else float32.")
    memory_dtype: DType = option(
        "auto", "Model", "Type of the memory cache. auto: float16, or float32 beside float32 weights."
    )
    quantization: Quantization = option(
        "none", "Model", "int8: weights of 8 bits with a scale each output, inputs quantised as they come."
    )
    kernel: KernelName = option("auto", "Model", "What does the arithmetic. auto: the fastest that runs here.")
    threads: int | None = option(
        None, "Model", "CPU threads of each engine. Default: the cores this process may use.", ge=1
    )
    max_model_len: int | None = option(
        None, "Limits", "Most tokens of a prompt and its completion. Default: the trained length.", ge=2
    )
    max_num_seqs: int = option(64, "Limits", "Most sequences generated at the same time.", ge=1)
    max_num_batched_tokens: int = option(256, "Limits", "Most tokens of one engine step.", ge=1)
    max_num_waiting: int = option(
        256, "Limits", "Most requests that wait for their turn; beyond it the answer is 503.", ge=0
    )
    max_num_waiting_tokens: int = option(
        262_144,
        "Limits",
        "Most tokens of requests that wait, prompts and longest completions together; beyond it the answer is 503.",
        ge=1,
    )
    memory: Bytes = option(
        None,
        "Limits",
        "Size of the memory cache, such as 2GiB, taken at the start. Default: what --max-num-seqs full sequences need, "
        "at most 40% of the memory available.",
        ge=1,
        metavar="SIZE",
    )
    block_size: int = option(32, "Limits", "Pairs in one block of the memory cache.", ge=1)
    prefix_cache: bool = option(
        True, "Limits", "Share the memory of texts that begin alike; --no-prefix-cache switches that off."
    )
    swap_memory: Bytes = option(
        None,
        "Limits",
        "Size of a second pool, in the machine's own memory, for what has to leave the memory cache. Of use beside a "
        "GPU; on a CPU more --memory does better. Default: none.",
        ge=1,
        metavar="SIZE",
    )


class ServeSettings(EngineSettings):
    """All options of `tessera serve`; also the keys a `--config` file may have."""

    host: str = option("127.0.0.1", "Server", "Address to listen on. 0.0.0.0 opens the server to the network.")
    port: int = option(8000, "Server", "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    uds: Path | None = option(None, "Server", "Unix socket to listen on, in place of host and port.", metavar="PATH")
    uds_mode: str = option(
        "600", "Server", "Who may use the Unix socket, three octal digits.", pattern="^[0-7]{3}$", metavar="MODE"
    )
    ssl_certfile: Path | None = option(
        None, "Server", "Certificate with its chain, PEM: HTTPS in place of HTTP. Read again on SIGHUP.", metavar="FILE"
    )
    ssl_keyfile: Path | None = option(
        None, "Server", "The certificate's private key, PEM. Default: in the same file.", metavar="FILE"
    )
    root_path: str = option(
        "",
        "Server",
        "Path under which a proxy shows this server, such as /tessera.",
        pattern=r"^(/[A-Za-z0-9._~-]+)*$",
        metavar="PATH",
    )
    trusted_proxies: Words = option(
        (),
        "Server",
        "Addresses or networks of proxies whose X-Forwarded-For and -Proto are believed; commas between; * is all.",
        metavar="ADDRESSES",
    )
    served_model_name: str | None = option(
        None, "Server", "Name of the model in the API. Default: the directory's name.", min_length=1, metavar="NAME"
    )
    cors_origins: Words = option(
        (),
        "Server",
        "Web sites whose pages may call this server, such as https://a.example; commas between.",
        metavar="URLS",
    )
    allowed_hosts: Words = option(
        (),
        "Server",
        "Names in Host headers that are taken beside localhost and addresses, such as a.example or *.a.example; commas "
        "between; * is all. Default: on loopback without keys none, else all.",
        metavar="NAMES",
    )
    api_key: Secrets = option(
        (),
        "Access",
        "Keys of which clients must send one, commas between. Better in the environment: others see a command line.",
        metavar="KEYS",
    )
    api_key_file: Path | None = option(
        None,
        "Access",
        "File of keys, one a line, or with limits of each where its name ends in .yaml. Read again on SIGHUP.",
        metavar="FILE",
    )
    requests_per_minute: int | None = option(
        None, "Access", "Most requests a minute of each key that has no limit of its own.", ge=1
    )
    tokens_per_minute: int | None = option(
        None, "Access", "Most tokens a minute, prompts and completions, of each key that has no limit of its own.", ge=1
    )
    public_metrics: bool = option(False, "Access", "Let those without a key see /metrics.")
    stream_keep_alive: float = option(
        15.0,
        "Server",
        "Seconds without anything to say after which a stream sends a comment; 0 for never.",
        ge=0,
        allow_inf_nan=False,
    )
    drain_delay: float = option(
        0.0,
        "Server",
        "Seconds after SIGTERM or Ctrl-C in which requests are still taken, for load balancers to see red readiness.",
        ge=0,
        allow_inf_nan=False,
    )
    drain_timeout: float = option(
        30.0,
        "Server",
        "Seconds that running requests get to finish after SIGTERM or Ctrl-C.",
        ge=0,
        allow_inf_nan=False,
    )
    slow_request: float = option(
        30.0,
        "Server",
        "Seconds after which a request is worth a warning in the log that says where its time went.",
        gt=0,
        allow_inf_nan=False,
    )
    trace_endpoint: str | None = option(
        None,
        "Server",
        "OTLP/HTTP collector for traces, such as http://127.0.0.1:4318. Needs the extra otel. Default: no traces.",
        pattern=r"^https?://.+",
        metavar="URL",
    )
    debug_endpoints: bool = option(
        False,
        "Server",
        "Serve /debug/requests and /debug/timeline without API keys. Where there are keys, an admin's opens them.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "Server", "Least severe log line shown.")
    log_format: LogFormat = option("text", "Server", "Lines of text, or one JSON object a line.")
    local: bool = option(False, "Ray", "One process: gateway and engine together, without Ray.")
    replicas: int = option(1, "Ray", "Engine replicas; with --max-replicas, those to start with.", ge=1)
    min_replicas: int = option(
        1, "Ray", "Fewest engine replicas, with --max-replicas. 0: none where nothing is asked for.", ge=0
    )
    max_replicas: int | None = option(
        None,
        "Ray",
        "Most engine replicas: there are as many as the tokens to be computed need. Default: always --replicas.",
        ge=1,
    )
    target_backlog: float = option(
        10.0,
        "Ray",
        "Seconds of work, at its measured speed, that each replica may have before there are more, up to "
        "--max-replicas.",
        gt=0,
        allow_inf_nan=False,
    )
    upscale_delay: float = option(
        5.0, "Ray", "Seconds for which more replicas have to be needed before they start.", ge=0, allow_inf_nan=False
    )
    downscale_delay: float = option(
        60.0,
        "Ray",
        "Seconds for which fewer replicas have to be enough before one ends, the last one included.",
        ge=0,
        allow_inf_nan=False,
    )
    wake_timeout: float = option(
        120.0,
        "Ray",
        "Seconds that a request waits for the first replica where --min-replicas 0 has left none.",
        gt=0,
        allow_inf_nan=False,
    )
    update_surge: int = option(
        25,
        "Ray",
        "Replicas that an update in a cluster may start beyond their number, in percent, rounded up, so that old ones "
        "serve until new ones do. 0: old ones go first.",
        ge=0,
        le=100,
    )
    num_gpus: float = option(0.0, "Ray", "GPUs of each replica.", ge=0, allow_inf_nan=False)
    resume_timeout: float = option(
        60.0,
        "Ray",
        "Seconds in which a request whose replica was lost may find another to go on at; 0 ends it with an error.",
        ge=0,
        allow_inf_nan=False,
    )
    ray_address: str | None = option(
        None, "Ray", "Cluster to run on, such as auto or HOST:PORT. Default: a private Ray on this machine."
    )
    routing: Routing = option(
        "prefix",
        "Ray",
        "Which replica a request without a session goes to: the one that was given most of its beginning before, or "
        "always the least loaded.",
    )
    model_copies: Bytes = option(
        "16GiB",
        "Ray",
        "Most that a machine of the cluster keeps of checkpoints which servers sent it because it has none, or another "
        "one, at --model. 0: none are sent.",
        ge=0,
        validate_default=True,
        metavar="SIZE",
    )

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model.resolve().name

    def engine_config(self) -> EngineConfig:
        """What an engine replica is told. Raises UsageError where two settings contradict each other."""
        try:
            return EngineConfig(
                model_dir=str(self.model.resolve()),
                device=self.device or ("cuda" if self.num_gpus else "cpu"),
                dtype=self.dtype,
                memory_dtype=self.memory_dtype,
                quantization=self.quantization,
                kernel=self.kernel,
                num_threads=self.threads,
                max_model_len=self.max_model_len,
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens,
                block_size=self.block_size,
                prefix_cache=self.prefix_cache,
                swap_bytes=self.swap_memory,
                memory_bytes=self.memory,
                max_num_waiting=self.max_num_waiting,
                max_num_waiting_tokens=self.max_num_waiting_tokens,
                trace_endpoint=self.trace_endpoint,
                fingerprint=self.model_fingerprint,
            )
        except ValueError as error:
            raise UsageError(name_flags(str(error))) from error

    @property
    def most_replicas(self) -> int:
        """As many as there may ever be."""
        return self.max_replicas or self.replicas

    def scaling(self) -> Scaling | None:
        """How the number of replicas changes; None where it does not. Raises UsageError where it cannot be so."""
        if self.max_replicas is None:
            for name in ("min_replicas", "target_backlog", "upscale_delay", "downscale_delay"):
                if name in self.model_fields_set:
                    raise UsageError(
                        f"{flag(name)} needs {flag('max_replicas')}: without it there are {flag('replicas')}"
                    )
            return None
        try:
            return Scaling(
                min_replicas=self.min_replicas,
                max_replicas=self.max_replicas,
                initial_replicas=self.replicas,
                target_backlog_s=self.target_backlog,
                upscale_delay_s=self.upscale_delay,
                downscale_delay_s=self.downscale_delay,
            )
        except ValueError as error:
            raise UsageError(name_flags(str(error)).replace("initial_replicas", flag("replicas"))) from error

    def gateway_settings(self) -> GatewaySettings:
        """What a gateway is told."""
        return GatewaySettings(
            cors_origins=self.cors_origins,
            allowed_hosts=self.allowed_hosts,
            root_path=self.root_path,
            keep_alive_s=self.stream_keep_alive or None,
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            has_public_metrics=self.public_metrics,
            has_debug=self.debug_endpoints,
            slow_request_s=self.slow_request,
        )


def flag(name: str) -> str:
    """The command line option of a setting: `max_num_seqs` is `--max-num-seqs`."""
    return "--" + name.replace("_", "-")


def name_flags(text: str) -> str:
    """`text` with the names of settings written as a user gives them."""
    return re.sub(r"\b[a-z]+(_[a-z]+)+\b", lambda m: flag(m[0]) if m[0] in ServeSettings.model_fields else m[0], text)


def env_name(name: str) -> str:
    """The environment variable of a setting: `max_num_seqs` is `TESSERA_MAX_NUM_SEQS`."""
    return ENV_PREFIX + name.upper()


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """Variables that look like options but are none. Those that Kubernetes makes for a Service do not count."""
    known = {env_name(name) for name in (*ServeSettings.model_fields, "config")}
    made = re.compile(
        ENV_PREFIX + r"(?:.+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_.+)?|PORT(?:_\d+_.+)?|REQUIRE_.+|UPDATE_.+)"
    )
    return sorted(v for v in environment if v.startswith(ENV_PREFIX) and v not in known and not made.fullmatch(v))


def load_settings(given: Mapping[str, Any], origins: Mapping[str, str], config: Path | None) -> ServeSettings:
    """Merges values `given` on the command line or in the environment over those of the file `config`.

    `origins` says where each given value came from ("--port", "TESSERA_PORT"). Raises UsageError.
    """
    from_file = _read_config(config) if config else {}
    try:
        return ServeSettings.model_validate({**from_file, **given})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        origin = origins.get(name) or f"{config}, key {name}"
        reason = first["msg"].removeprefix("Value error, ")
        if name in _SECRET:
            raise UsageError(f"{origin}: {reason}") from None
        raise UsageError(f"{origin}: {reason} (got {first['input']!r})") from error


def _read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Keys are option names, written with dashes or underscores."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: must hold a mapping of option names to values")
    named = {str(key).replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(named.keys() - ServeSettings.model_fields.keys())
    if unknown:
        raise UsageError(f"--config {path}: unknown option {', '.join(map(repr, unknown))}")
    return named
