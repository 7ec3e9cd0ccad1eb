"""Starts Ray with what a configuration needs, and shuts it down."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from rllib_gtpo.errors import ConfigError

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig


_CONNECT_S = 10.0


class SessionOptions(Protocol):
    """The options that matter here."""

    num_cpus: int | None
    num_gpus: int | None
    ray_address: str | None
    debug: bool


def check_resources(config: AlgorithmConfig) -> dict[str, float]:
    """What one trial of `config` needs in total; also validates the config.

    Raises:
        ConfigError: The config contradicts itself.
    """
    cls: Any = config.algo_class
    try:
        factory = cls.default_resource_request(config.copy(copy_frozen=False))
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    return dict(factory.required_resources) if factory is not None else {}


@contextmanager
def ray_session(needs: Mapping[str, float], options: SessionOptions) -> Iterator[None]:
    """Ray, started here and stopped at the end, or the session that is already there.

    CPUs are Ray's bookkeeping, not a reservation: a config that asks for more than the machine
    has gets them, instead of waiting for ever.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        address = options.ray_address or os.environ.get("RAY_ADDRESS")
        if address:
            _connect(address)
        else:
            _start(needs, options)
        yield
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    """Ray itself tries for minutes to reach what is not there."""
    import ray

    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():
            socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
        ray.init(address=address, logging_level="WARNING")
    except OSError as error:  # ConnectionError is one
        raise ConfigError(
            f"no Ray cluster answers at {address}: {error}; `ray start --head` starts one and says "
            "its address, and without --ray-address and RAY_ADDRESS Ray starts with the command"
        ) from error


def _start(needs: Mapping[str, float], options: SessionOptions) -> None:
    import ray

    cpus = options.num_cpus or max(os.cpu_count() or 1, int(needs.get("CPU", 1)))
    # Ray's workers print RLlib's messages too; the hook silences the same ones there.
    runtime_env: dict[str, Any] = {}
    if not options.debug:
        runtime_env["worker_process_setup_hook"] = "rllib_gtpo.command.quiet.silence"
    ray.init(
        num_cpus=cpus,
        num_gpus=options.num_gpus,
        include_dashboard=False,
        logging_level="INFO" if options.debug else "WARNING",
        runtime_env=runtime_env or None,
    )
    have = ray.cluster_resources()
    for resource, amount in needs.items():
        if amount > have.get(resource, 0):
            raise ConfigError(
                f"the config needs {amount:g} {resource}, Ray has {have.get(resource, 0):g}"
                + (f": raise --num-{resource.lower()}s" if resource in ("CPU", "GPU") else "")
            )
