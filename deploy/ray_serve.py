"""The same server on several machines: one replica of the app a Ray Serve actor, requests spread by Ray's proxy.

    pip install 'trimode[distributed]'
    serve run deploy.ray_serve:app model=smollm2-135m replicas=2

or from Python, `serve.run(build(model="...", replicas=4))`. Each replica loads the model and has an engine of its own; one that dies is
started again by Ray, and clients that repeat a failed request (OpenAI's do) lose nothing.
"""

from collections.abc import Callable
from typing import Any

from ray import serve

__all__ = ["app", "build"]


def load_preset(name: str) -> Any:
    """A replica's model."""
    import trimode

    return trimode.load(name)


def build(
    *, model: str = "smollm2-135m", replicas: int = 2, load: Callable[[str], Any] = load_preset, num_cpus: float = 1
) -> serve.Application:
    """The application. `load` gives a replica its model; it must be importable on every machine."""

    def make_app() -> Any:
        from trimode.server.app import create_app
        from trimode.server.keys import ApiKeys
        from trimode.server.service import Service

        return create_app(Service(load(model), name=model, keys=ApiKeys.read(None)))

    @serve.deployment(
        num_replicas=replicas,
        ray_actor_options={"num_cpus": num_cpus},
        # the engine has a queue of its own, with an answer of its own when it is full
        max_ongoing_requests=256,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=40,
    )
    @serve.ingress(make_app)
    class Replica:
        pass

    return Replica.bind()


def app(arguments: dict[str, str]) -> serve.Application:
    """What `serve run` calls, with the `key=value` pairs behind it."""
    return build(model=arguments.get("model", "smollm2-135m"), replicas=int(arguments.get("replicas", "2")))
