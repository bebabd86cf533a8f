"""A node's Prometheus endpoint, which serves all its ranks, and how Prometheus finds it."""

from __future__ import annotations

import base64
import errno
import hmac
import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Metric, delete_from_gateway, push_to_gateway, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from lte_scale.config.schema import MetricsConfig
from lte_scale.log import log

PORTS_TRIED = 100


def make_directory() -> Path | None:
    """A directory of this node for `Instruments`; None, with a warning, if there can be none."""
    try:
        return Path(tempfile.mkdtemp(prefix="lte-metrics-"))
    except OSError as error:
        log.warning("no metrics for Prometheus from %s: %s; training goes on", socket.gethostname(), error)
        return None


class _Ranks(MultiProcessCollector):
    """What the ranks of a node have written; the gauges of those that are dead are left out."""

    def collect(self) -> Iterable[Metric]:
        for file in Path(self._path).glob("gauge_*.db"):
            pid = int(file.stem.rpartition("_")[2])
            if not Path("/proc", str(pid)).exists():
                mark_process_dead(pid, self._path)
        return super().collect()


class Endpoint:
    """Serves `directory` over HTTP or HTTPS until `close`, in a thread, and deletes it then.

    Where it listens is in `node<K>.json` of the discovery directory, in the form of Prometheus's file_sd, with the
    name of the run as the label `job`.

    Attributes:
        port: where it listens, which is the next free port if the one asked for is taken.

    Raises:
        ValueError: if it cannot listen, or a certificate or password file cannot be used; naming the key.
    """

    def __init__(self, config: MetricsConfig, directory: Path, *, node: int, run_dir: Path) -> None:
        self.directory, self.node = directory, node
        self.registry = CollectorRegistry()
        _Ranks(self.registry, str(directory))  # type: ignore[no-untyped-call]
        self.server, self._thread = self._listen(config)
        if config.password_file:
            self.server.set_app(_behind_password(self.server.get_app(), _read_password(config.password_file)))
        self.port = self.server.server_port
        host = config.address.strip("[]")
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        self.target = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self.url = f"{'https' if config.certificate else 'http'}://{self.target}/metrics"
        if config.port and self.port != config.port:
            log.warning("metrics.port %d is in use: node %d serves %s", config.port, node, self.url)
        else:
            log.info("node %d serves %s", node, self.url)
        job = job_of(config, run_dir)
        self._file = self._announce(config, run_dir, job)
        self._pusher = Pusher(config, self.registry, job=job, node=node) if config.pushgateway else None

    def _listen(self, config: MetricsConfig) -> tuple[WSGIServer, threading.Thread]:
        tls: dict[str, Any] = {}
        if config.certificate:
            tls = {"certfile": config.certificate, "keyfile": config.key or config.certificate}
        if config.client_ca:
            tls |= {"client_cafile": config.client_ca, "client_auth_required": True}
        first, address = config.port, config.address.strip("[]")
        last = min(first + PORTS_TRIED, 65535) if first else 0
        for port in range(first, last + 1):
            try:
                return start_http_server(port, address, self.registry, **tls)
            except OSError as error:
                if "certificate" in str(error) or "SSL" in str(error):
                    raise ValueError(f"metrics.certificate, key, client_ca: {error}") from error
                if error.errno != errno.EADDRINUSE:
                    raise ValueError(
                        f"metrics.address: cannot listen on {address}:{port} ({error.strerror or error}); "
                        "use 127.0.0.1, 0.0.0.0 or an address of this machine, and a port from 1024 on"
                    ) from error
        raise ValueError(f"metrics.port: {first} to {last} are all in use on {address}; choose another, or 0 for none")

    def _announce(self, config: MetricsConfig, run_dir: Path, job: str) -> Path | None:
        if config.discovery_dir:  # shared by runs
            file = Path(config.discovery_dir) / f"{job}-node{self.node}.json"
        else:
            file = run_dir / "endpoints" / f"node{self.node}.json"
        labels = {"job": job, **({"__scheme__": "https"} if config.certificate else {})}
        temporary = file.with_name(f".{file.name}.tmp")  # Prometheus may read at any moment
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps([{"targets": [self.target], "labels": labels}]) + "\n")
            os.replace(temporary, file)
        except OSError as error:
            log.warning("Prometheus will not find node %d by itself: cannot write %s (%s)", self.node, file, error)
            return None
        return file

    def close(self) -> None:
        """Stop serving, free the port, delete what the ranks have written. May be called twice."""
        if self._pusher is not None:
            self._pusher.close()
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()
        shutil.rmtree(self.directory, ignore_errors=True)


def job_of(config: MetricsConfig, run_dir: Path) -> str:
    """The run's name in Prometheus."""
    return config.job or run_dir.resolve().name


class Pusher:
    """Pushes what an endpoint serves to a Pushgateway now and then, and takes it back at the end."""

    def __init__(self, config: MetricsConfig, registry: CollectorRegistry, *, job: str, node: int) -> None:
        self.url, self.registry, self.job, self.group = config.pushgateway, registry, job, {"node": str(node)}
        self.every, self._failed = config.push_seconds, False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pushgateway", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(self.every):
            try:
                push_to_gateway(self.url, self.job, self.registry, self.group, timeout=5)
            except Exception as error:  # it speaks HTTP: OSError and many others
                if not self._failed:
                    log.warning("metrics.pushgateway: %s does not answer (%s); training goes on", self.url, error)
                self._failed = True
            else:
                self._failed = False

    def close(self) -> None:
        self._ended.set()
        self._thread.join(timeout=10)
        if not self._failed:
            with suppress(Exception):
                delete_from_gateway(self.url, self.job, self.group, timeout=5)


def basic_auth(user_and_password: str) -> str:
    """The header of basic authentication for `user:password`."""
    return "Basic " + base64.b64encode(user_and_password.encode()).decode()


def _read_password(path: str) -> bytes:
    try:
        text = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"metrics.password_file: cannot read {path} ({error})") from error
    if ":" not in text:
        raise ValueError(f"metrics.password_file: {path} does not hold a line user:password")
    return basic_auth(text).encode()


def _behind_password(app: Any, expected: bytes) -> Callable[..., Any]:
    """prometheus-client's server knows TLS but no passwords."""

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if hmac.compare_digest(environ.get("HTTP_AUTHORIZATION", "").encode(), expected):
            return app(environ, start_response)
        start_response("401 Unauthorized", [("WWW-Authenticate", 'Basic realm="metrics"')])
        return [b""]

    return guarded
