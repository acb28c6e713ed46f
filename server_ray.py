"""The service on Ray Serve: replicas of the whole of it, one for each GPU, or for some cores.

    serve run server_ray:build max_replicas=4 device=cuda

A WebSocket is one connection to one replica, so that a session stays where it has begun. More replicas are started
when there are more sessions than they should have, and when a session is behind; a replica that is no longer needed
ends when its sessions have. Sessions cannot be resumed, since a new connection may come to another replica.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ray import serve
from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy

from asgi import application
from models.checkpoint import load_recognizer
from models.translator import EMBEDDED_TRANSLATOR, load_translator
from server import Settings
from streaming.errors import DragomanError
from streaming.scheduler import prepare_process
from streaming.speculation import speculation_for

LATE_S: Final = 1.0
"""Seconds that a session of a replica may be behind, on average, before there should be another replica."""

_OTHER_REQUESTS: Final = 4  # of health and the like, at a time, beside the sessions


@dataclass(frozen=True)
class Options:
    """What ``serve run`` can be told, beside the tokens, which are taken from ``DRAGOMAN_TOKEN``, with spaces between.

    Attributes:
        model: Folder of the recogniser; empty for the embedded one.
        translator: Folder of the translator; empty for the embedded one.
        device: ``cpu`` or ``cuda``.
        dtype: ``float32`` or ``bfloat16``.
        max_sessions: Sessions of one replica at a time.
        target_sessions: Sessions that a replica should have, above which another one is started; 0 for three
            quarters of `max_sessions`.
        min_replicas: Replicas that there always are.
        max_replicas: Replicas that there may be.
        cpus: Cores of a replica.
        drain_s: Seconds that the sessions of a replica may still take when it is to end.
    """

    model: str = ""
    translator: str = ""
    device: str = "cpu"
    dtype: str = "float32"
    max_sessions: int = 16
    target_sessions: int = 0
    min_replicas: int = 1
    max_replicas: int = 1
    cpus: float = 1.0
    drain_s: float = 600.0


@serve.deployment
@serve.ingress()
class Replica:
    """One process with the models."""

    def __init__(self, options: Options, tokens: tuple[str, ...]) -> None:
        self._options = options
        self._tokens = tokens

    def __serve_build_asgi_app__(self) -> Any:
        """What answers; called once, by Ray."""
        o = self._options
        prepare_process()
        recognizer = load_recognizer(Path(o.model) if o.model else None, device=o.device, dtype=o.dtype)
        translator = drafts = None
        if o.translator or EMBEDDED_TRANSLATOR.exists():
            folder = Path(o.translator) if o.translator else EMBEDDED_TRANSLATOR
            translator = load_translator(folder, device=o.device, dtype=o.dtype)
            drafts = speculation_for(translator, folder)
        settings = Settings(max_sessions=o.max_sessions, tokens=self._tokens, metrics=True, resume_s=0.0)
        app = application(recognizer, settings, translator, drafts)
        self._engine = app.state.handler.engine
        return app

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray asks for now and then: how far the session is behind that is most so."""
        now_s = time.monotonic()
        return {"lag_s": max((stream.lag_s(now_s) for stream in self._engine.streams), default=0.0)}


def replicas_wanted(ctx: Any) -> tuple[float, dict[str, Any]]:
    """As many replicas as sessions need, and one more where a session is behind; called by Ray."""
    wanted, state = replica_queue_length_autoscaling_policy(ctx)
    lags_s = (ctx.aggregated_metrics or {}).get("lag_s", {}).values()
    if max(lags_s, default=0.0) > LATE_S:
        wanted = max(wanted, ctx.current_num_replicas + 1)
    return wanted, state


def build(arguments: Mapping[str, Any]) -> Any:
    """The application that ``serve run server_ray:build NAME=VALUE ...`` runs.

    Raises:
        DragomanError: ``unknown_option`` or ``invalid_value``.
    """
    options = read_options(arguments)
    deployment = Replica.options(  # type: ignore[attr-defined]
        max_ongoing_requests=options.max_sessions + _OTHER_REQUESTS,
        max_queued_requests=options.max_sessions,
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.target_sessions or max(1, 3 * options.max_sessions // 4),
            "policy": {"policy_function": replicas_wanted},
        },
        graceful_shutdown_timeout_s=options.drain_s,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": int(options.device.startswith("cuda"))},
    )
    return deployment.bind(options, tuple(os.environ.get("DRAGOMAN_TOKEN", "").split()))


def read_options(arguments: Mapping[str, Any]) -> Options:
    """The options in arguments, whose values may be text.

    Raises:
        DragomanError: ``unknown_option`` or ``invalid_value``.
    """
    kinds: dict[str, type] = {name: type(value) for name, value in asdict(Options()).items()}
    for name in arguments:
        if name not in kinds:
            raise DragomanError("unknown_option", f"there is no option {name}: there are {', '.join(kinds)}")
    try:
        options = Options(**{name: kinds[name](value) for name, value in arguments.items()})
    except ValueError as error:
        raise DragomanError("invalid_value", f"an option is not the number that it must be: {error}") from None
    if not 0 <= options.min_replicas <= options.max_replicas or not 1 <= options.max_replicas:
        counts = f"{options.min_replicas} to {options.max_replicas}"
        raise DragomanError("invalid_value", f"there cannot be {counts} replicas: min_replicas is the smaller number")
    return options
