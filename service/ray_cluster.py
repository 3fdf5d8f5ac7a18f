"""Ray for one launcher: a private one on this machine that lives and dies with this process, or a cluster's.

Ray reads its environment when it is imported, so nothing here imports it before `start` has set that.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

from service import errors
from service.errors import CommandError, EngineStartError, UsageError

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.schema import ServeStatus

    from service.ray_frontends import Frontend

logger = logging.getLogger(__name__)

_DIR_PREFIX = "tessera-"
_LOCK = "lock"
# Ray puts sockets below the directory, and a socket's path may have 107 characters.
_MAX_DIR_CHARS = 36
_OBJECT_STORE_BYTES = 100 * 2**20
_POLL_S = 0.1
_STOP_TIMEOUT_S = 6.0

_SERVE_ENV = {
    # Signals are this process's own: Ray's handler would print a stack and abort on SIGTERM.
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A thread of Serve's that outlives the cluster would start another one.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # No HTTP of Serve's own: the gateway listens in this process.
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
}
_LOCAL_ENV = {
    # Every port on loopback, whatever the address of the machine.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    # Ray runs workers at nice 15 by default, but these replicas are what the machine is for.
    "RAY_worker_niceness": "0",
    # Ray's own measurements and a busier look-out cost a twentieth of a core and have no reader here.
    "RAY_enable_metrics_collection": "false",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
}

T = TypeVar("T")


class RayCluster:
    """Ray and Serve, started or joined, then left. All methods are called on one event loop.

    Ray's processes end with the *thread* that started them, and starting blocks for seconds: so one thread of this
    object's own makes all calls, and lives as long as Ray is to live.
    """

    def __init__(self, address: str | None = None, *, num_cpus: int = 2) -> None:
        self._address = address
        self._num_cpus = num_cpus
        self._worker = _Worker()
        self._run_dir: _RunDir | None = None
        self._frontend: Frontend | None = None

    async def start(self) -> None:
        """Starts a private Ray, or joins the cluster at the address. Raises EngineStartError."""
        try:
            os.environ |= _SERVE_ENV
            if self._address is None:
                self._run_dir = _RunDir()
                os.environ |= _LOCAL_ENV | self._run_dir.env
                os.environ.pop("RAY_AUTH_TOKEN", None)
            await self._worker.call(self._start)
        except Exception as error:
            raise EngineStartError(f"Ray did not start: {_last_line(str(error))}") from error

    async def require_gpus(self, num_gpus: float) -> None:
        """Raises UsageError where a private Ray has fewer: a replica would wait for them for ever."""
        if self._run_dir is not None and num_gpus > (found := await self._worker.call(_count_gpus)):
            raise UsageError(f"--num-gpus: the replicas need {num_gpus:g} GPUs, but Ray finds {found:g} here")

    async def deploy(
        self,
        build: Callable[[], Application],
        name: str,
        terms: Mapping[str, object] | None = None,
        model: Path | None = None,
    ) -> None:
        """Runs the application that `build` returns and waits until it is ready. Raises EngineStartError.

        `build` runs when Ray has been imported, and in Ray's thread. With `terms` the application is shared by all who
        name it with the same ones, and UsageError is raised where others' differ. `model` is then a directory that this
        process gives to replicas which lack it.
        """
        if terms is None:
            await self._worker.call(lambda: _run(build(), name))
        else:
            while True:  # until nobody else is just coming or going
                if await self._worker.call(lambda: self._join(build, name, terms, model)):
                    break
                await asyncio.sleep(_POLL_S)
        said = ""
        while (message := await self._worker.call(lambda: _what_is_missing(name))) is not None:
            if message and message != said:
                logger.warning("%s", message)
            said = message
            await asyncio.sleep(_POLL_S)

    async def stop(self) -> bool:
        """Ends what `start` and `deploy` began: with a private Ray, every process and file of it.

        False where that took too long and they were killed. This process's own part of Ray is then still at work, and
        the process should end at once.
        """
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await self._worker.call(self._stop)
            is_stopped = True
        except TimeoutError:
            is_stopped = False
        self._worker.end()
        if self._run_dir is not None:
            await asyncio.to_thread(self._run_dir.remove)
        return is_stopped

    def _start(self) -> None:
        import ray
        from ray import serve

        # What they have to say at lower levels is about themselves.
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
        if self._run_dir is None:
            ray.init(self._address, log_to_driver=False, configure_logging=False)
        else:
            ray.init(
                "local",
                num_cpus=self._num_cpus,
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=str(self._run_dir.ray_path),
            )
        serve.start(proxy_location="Disabled")

    def _join(
        self, build: Callable[[], Application], name: str, terms: Mapping[str, object], model: Path | None
    ) -> bool:
        from service.ray_frontends import Frontend

        self._frontend = self._frontend or Frontend(name, terms, model)
        return self._frontend.join(lambda: _run(build(), name))

    def _stop(self) -> None:
        import ray

        # A private Ray goes as a whole, and faster than it would piece by piece.
        if self._frontend is not None and ray.is_initialized():
            while not self._frontend.leave():
                time.sleep(_POLL_S)
        ray.shutdown()


def _run(app: Application, name: str) -> None:
    from ray import serve

    target = serve.RunTarget(app, name=name, route_prefix=None)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _what_is_missing(name: str) -> str | None:
    """Serve's remark on an application that is not ready, often none; None when it is.

    Raises CommandError when it never will be.
    """
    from ray import serve

    status: ServeStatus = serve.status()
    app = status.applications.get(name)
    if app is None:
        return ""
    remarks = [deployment.message for deployment in app.deployments.values() if deployment.message]
    if app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
        raise _start_error(_last_line(remarks[0] if remarks else app.message))
    return None if app.status == "RUNNING" else " ".join(" ".join(remarks).split())


def _count_gpus() -> float:
    import ray

    return float(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]


def _start_error(line: str) -> CommandError:
    """The error a replica ended with, from the last line of its traceback."""
    name, _, message = line.removeprefix(f"{errors.__name__}.").partition(": ")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, CommandError):
        return kind(message)
    return EngineStartError(f"the engine did not start: {line}")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


class _RunDir:
    """A private directory for one Ray, short enough for its sockets, removed at the end.

    A launcher that was killed leaves its directory behind; the next one removes it, recognising it by its lock.
    """

    def __init__(self) -> None:
        base = Path(tempfile.gettempdir())
        if len(str(base)) + len(_DIR_PREFIX) + 8 > _MAX_DIR_CHARS:
            base = Path("/tmp")  # noqa: S108 - mkdtemp makes a directory that is ours alone
        _remove_abandoned(base)
        self.path = Path(tempfile.mkdtemp(prefix=_DIR_PREFIX, dir=base))
        self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # Ray opens its directory to everybody, so that has to be one inside.
        self.ray_path = self.path / "ray"
        self._token = self.path / "token"
        with os.fdopen(os.open(self._token, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))

    @property
    def env(self) -> dict[str, str]:
        return {"RAY_TMPDIR": str(self.ray_path), "RAY_AUTH_TOKEN_PATH": str(self._token)}

    def remove(self) -> None:
        """Ends every process that still belongs to the directory and deletes it."""
        _clear(self.path)
        os.close(self._lock)


def _remove_abandoned(base: Path) -> None:
    for path in base.glob(_DIR_PREFIX + "*"):
        with contextlib.suppress(OSError):
            if path.stat().st_uid != os.getuid():
                continue
            lock = os.open(path / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _clear(path)
            finally:
                os.close(lock)


def _clear(path: Path) -> None:
    """Kills the processes that have files of the directory open, and deletes it."""
    for process in Path("/proc").glob("[0-9]*"):
        pid = int(process.name)
        if pid != os.getpid() and _has_open(process, f"{path}/"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    # A process that is just dying may still write a last line.
    for _ in range(20):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.05)


def _has_open(process: Path, prefix: str) -> bool:
    # Processes of others and those that have just ended cannot be looked into.
    with contextlib.suppress(OSError):
        for file in (process / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if str(file.readlink()).startswith(prefix):
                    return True
    return False


class _Worker:
    """A thread that makes one call after the other. Unlike an executor's, it keeps no process from ending."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        Thread(target=self._run, name="ray", daemon=True).start()

    async def call(self, function: Callable[[], T]) -> T:
        """The result of `function`, or what it raised. A caller that is cancelled does not stop it."""
        future: Future[T] = Future()

        def call() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(call)
        return await asyncio.shield(asyncio.wrap_future(future))

    def end(self) -> None:
        """Lets the thread end after the calls that were made."""
        self._calls.put(None)

    def _run(self) -> None:
        for call in iter(self._calls.get, None):
            call()
