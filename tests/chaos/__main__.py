"""`tessera serve` over Ray whose engines break on demand: `python -m tests.chaos ORDERS [OPTION VALUE]...`.

A file `replicas-N` in the directory ORDERS deploys the engines anew, N of them.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from service import ray_cluster, ray_launcher
from service.config import EngineConfig
from service.progress import Progress
from service.settings import ServeSettings

if TYPE_CHECKING:
    from ray.serve import Application

STALL_TIMEOUT_S = 3.0


def main() -> None:
    """Serves until a signal."""
    orders = Path(sys.argv[1])
    names = [name.removeprefix("--").replace("-", "_") for name in sys.argv[2::2]]
    settings = ServeSettings.model_validate(dict(zip(names, sys.argv[3::2], strict=True)))

    def application(settings: ServeSettings, config: EngineConfig) -> Application:
        from service.deployment import engine_application
        from tests.chaos.obedient import load_obedient

        return engine_application(
            replace(config, stall_timeout_s=STALL_TIMEOUT_S),
            num_replicas=settings.replicas,
            num_cpus=0.5,
            drain_timeout_s=settings.drain_timeout,
            load=partial(load_obedient, orders=orders),
        )

    def obey(config: EngineConfig) -> None:
        while True:
            for order in sorted(orders.glob("replicas-*")):
                changed = settings.model_copy(update={"replicas": int(order.name.partition("-")[2])})
                order.unlink()
                ray_cluster._run(application(changed, config), ray_launcher._app_name(settings))
            time.sleep(0.1)

    ray_launcher._application = application
    Thread(target=obey, args=(ray_launcher._engine_config(settings),), daemon=True).start()
    ray_launcher.serve_ray(settings, Progress())


if __name__ == "__main__":
    main()
