"""The `tessera` command: reads options, hands them to what does the work, turns failures into a line and an exit code.

Imports of torch, Ray and the gateway happen inside commands, so that `--help` answers at once.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Optional, get_args, get_origin

import typer
from typer.exceptions import TyperException

from service.errors import CommandError, ExitCode, UsageError
from service.logs import configure_logging, is_json
from service.settings import ServeSettings, env_name, flag, load_settings, unknown_variables
from service.version import package_version

app = typer.Typer(
    name="tessera",
    help="An inference server for Memory Mosaics, language models made of associative memories.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# What `generate` and `info` take: the rest of the settings is about serving many requests.
ENGINE_OPTIONS = ("model", "device", "dtype", "memory_dtype", "kernel", "threads", "max_model_len")
INFO_OPTIONS = (*ENGINE_OPTIONS, "max_num_seqs", "block_size", "memory", "prefix_cache", "swap_memory")
BATCH_OPTIONS = (*INFO_OPTIONS, "max_num_batched_tokens", "served_model_name", "log_format")

Config = Annotated[
    Optional[Path],  # noqa: UP045 - read by typer
    typer.Option(
        "--config",
        envvar="TESSERA_CONFIG",
        show_envvar=False,
        metavar="FILE",
        help="YAML file of options; the command line and the environment win over it.",
    ),
]


def settings_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command one option per named setting, and `settings` in place of their values."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]

        def wrapper(ctx: typer.Context, config: Path | None = None, **values: Any) -> None:
            given = {name: values.pop(name) for name in names}
            command(settings=_merge(ctx, given, config), **values)

        parameters = [
            *own,
            inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *map(_parameter, names),
            inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Config),
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
        return wrapper

    return decorate


def _parameter(name: str) -> inspect.Parameter:
    """The option of one setting. Its default is None, so that a file's value shows through."""
    field = ServeSettings.model_fields[name]
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    # Values arrive as they were written, so that one place reads them and names where a bad one came from.
    kind: Any = bool if field.annotation is bool else str
    annotation = Annotated[
        Optional[kind],  # noqa: UP045 - a value, not an annotation
        typer.Option(
            f"{flag(name)}/{flag('no_' + name)}" if kind is bool else flag(name),
            envvar=env_name(name),
            show_envvar=False,
            help=_help(name),
            show_default=False,
            metavar=None if kind is bool else str(extra.get("metavar") or _metavar(field.annotation)),
            rich_help_panel=str(extra["group"]),
        ),
    ]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    kinds = (annotation, *get_args(annotation))
    return next((name for kind, name in ((int, "INT"), (float, "NUMBER")) if kind in kinds), "TEXT")


def _help(name: str) -> str:
    field = ServeSettings.model_fields[name]
    text = field.description or ""
    if field.default is None or field.default is False or field.default in ((), ""):
        return text
    default = "on" if field.default is True else getattr(field.default, "name", field.default)
    return f"{text} \\[default: {default}]"


def _merge(ctx: typer.Context, given: dict[str, Any], config: Path | None) -> ServeSettings:
    given = {name: value for name, value in given.items() if value is not None}
    origins = {name: flag(name) if _is_typed(ctx, name) else env_name(name) for name in given}
    if _is_typed(ctx, "api_key"):
        _hide_api_key(given["api_key"])
    # What is read here no child inherits, a Ray worker least of all.
    os.environ.pop(env_name("api_key"), None)
    settings = load_settings(given, origins, config)
    if settings.log_format == "json":
        configure_logging(settings.log_level, "json")
    for variable in unknown_variables(os.environ):
        _say(f"{variable} is ignored: there is no such option")
    return settings


def _hide_api_key(value: str) -> None:
    """Starts this program anew with the key in its environment: a command line can be read by everybody, and Ray does.

    Does nothing where the process was started by another program, which uses this as a library.
    """
    program = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    if [*program, *sys.argv[1:]] != sys.orig_argv:
        return
    rest, words = list[str](), iter(sys.argv[1:])
    for word in words:
        if word == flag("api_key"):
            next(words)
        elif not word.startswith(flag("api_key") + "="):
            rest.append(word)
    os.environ[env_name("api_key")] = value
    os.execv(sys.executable, [*program, *rest])  # noqa: S606 - ourselves


def _is_typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    is_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if is_version:
        typer.echo(f"tessera {package_version()}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(ExitCode.USAGE)


@app.command()
@settings_options(*ServeSettings.model_fields)
def serve(settings: ServeSettings) -> None:
    """Serve a model over an OpenAI-compatible HTTP API.

    Every option can also be given as TESSERA_<NAME> in the environment or as a key of the --config file.
    """
    from service.progress import Progress

    if settings.local:
        from service.launcher import serve_local

        serve_local(settings, Progress())
    else:
        from service.ray_launcher import serve_ray

        serve_ray(settings, Progress())


@app.command()
@settings_options(*ENGINE_OPTIONS)
def generate(
    settings: ServeSettings,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Keep the likeliest tokens up to this mass.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Drop tokens below this fraction of the likeliest.")
    ] = 0.0,
    seed: Annotated[
        Optional[int],  # noqa: UP045 - read by typer
        typer.Option(min=0, max=2**63 - 1, help="Same seed, same text. Default: a new one each time."),
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of the text.")] = False,
) -> None:
    """Continue a text on the terminal, as it is generated. Piped, prints the continuation alone."""
    from service.generate import Sampling, generate_text

    sampling = Sampling(max_tokens, temperature, top_k, top_p, min_p, seed, ignore_eos)
    generate_text(settings, _read_prompt(prompt), sampling)


def _read_prompt(prompt: str) -> str:
    if prompt != "-":
        return prompt
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("the prompt on standard input is not UTF-8 text") from error
    return text.removesuffix("\n")


@app.command()
@settings_options(*INFO_OPTIONS)
def info(
    settings: ServeSettings,
    is_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a model directory holds and how much of it fits on this machine."""
    from service.info import describe, print_json, print_table

    facts = describe(settings)
    (print_json if is_json else print_table)(facts)


@app.command()
@settings_options(*BATCH_OPTIONS)
def batch(
    settings: ServeSettings,
    source: Annotated[Path, typer.Argument(metavar="IN.JSONL", help="Requests, one a line in OpenAI's batch format.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.JSONL", help="Where the answers go.")],
) -> None:
    """Answer a file of requests without a server. Run again, it goes on where it was interrupted."""
    from service.batch import run_batch
    from service.progress import Progress

    run_batch(settings, source, target, Progress())


def main() -> None:
    """Runs the command line. Ends the process with one of `ExitCode`."""
    try:
        code = app(prog_name="tessera", standalone_mode=False)
    except TyperException as error:
        _fail(error.format_message(), error.exit_code)
    except CommandError as error:
        _fail(str(error), error.exit_code)
    sys.exit(code or ExitCode.OK)


def _fail(message: str, code: int) -> NoReturn:
    _say(" ".join(message.split()), logging.ERROR)
    sys.exit(code)


def _say(message: str, level: int = logging.WARNING) -> None:
    if is_json():
        logging.getLogger("tessera").log(level, "%s", message)
    else:
        print(f"tessera: {message}", file=sys.stderr)
