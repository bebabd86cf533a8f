"""Where the endpoints of a run are, what they say, and how much their counters have grown."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPSHandler, ProxyHandler, Request, build_opener

from prometheus_client.parser import text_string_to_metric_families

from lte_scale.metrics.endpoint import basic_auth
from lte_scale.top.figures import natural

CUMULATIVE = ("_total", "_sum", "_count", "_bucket")
START = "lte_start_timestamp_seconds"
SKEW_SECONDS = 2.0
Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Target:
    """An endpoint. `name` is what to call it, `authorization` the header for it, if any."""

    url: str
    name: str
    authorization: str = ""


def find(words: list[str]) -> list[Target]:
    """The targets that the words of a command line name: URLs, and directories of runs.

    Raises:
        ValueError: if one is neither, or a run has no endpoints.
    """
    targets = [target for word in words for target in (_of_run(Path(word)) if Path(word).is_dir() else [parse(word)])]
    return list(dict.fromkeys(targets))


def parse(word: str) -> Target:
    """A target from its URL, of which scheme and path may be left out; `user:password@` is for basic authentication.

    Raises:
        ValueError: if it is none.
    """
    shown = word.rpartition("@")[2]  # without the password
    refusal = f"{shown}: neither the directory of a run nor an address such as host:9464 or http://host:9464/metrics"
    parts = urlsplit(word if "://" in word else f"http://{word}")
    try:
        port = parts.port
    except ValueError as error:
        raise ValueError(refusal) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or (port is None and "://" not in word):
        raise ValueError(refusal)
    user, at, place = parts.netloc.rpartition("@")
    path = parts.path if parts.path not in ("", "/") else "/metrics"
    query = f"?{parts.query}" if parts.query else ""
    return Target(f"{parts.scheme}://{place}{path}{query}", place, basic_auth(unquote(user)) if at else "")


def _of_run(run_dir: Path) -> list[Target]:
    targets = []
    for path in sorted((run_dir / "endpoints").glob("*.json"), key=lambda path: natural(path.name)):
        try:
            for group in json.loads(path.read_text()):
                scheme = group.get("labels", {}).get("__scheme__", "http")
                targets += [parse(f"{scheme}://{address}") for address in group["targets"]]
        except FileNotFoundError:  # of a node that has just ended
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: no list of Prometheus targets ({type(error).__name__}: {error})") from error
    if not targets:
        raise ValueError(
            f"{run_dir}: no endpoints; give the directory of a running run with metrics.port set, or a node's URL"
        )
    return targets


@dataclass(frozen=True, slots=True)
class Scrape:
    """What an endpoint said at `time`, by the target's clock: metric, labels, value."""

    time: float
    series: Mapping[str, Mapping[Labels, float]]

    def by(self, label: str, metric: str, **labels: str) -> dict[str, float]:
        """Sums of a metric's series with these labels, by the values of another label."""
        sums: dict[str, float] = {}
        for key, value in self.series.get(metric, {}).items():
            if labels.items() <= key:
                name = dict(key).get(label, "")
                sums[name] = sums.get(name, 0.0) + value
        return sums

    def values(self, metric: str, **labels: str) -> list[float]:
        return [value for key, value in self.series.get(metric, {}).items() if labels.items() <= key]

    def total(self, metric: str, **labels: str) -> float:
        return sum(self.values(metric, **labels))

    def value(self, metric: str) -> float | None:
        """The only series of a metric; None where there is none."""
        return next(iter(self.values(metric)), None)

    def info(self, metric: str) -> dict[str, str]:
        """The labels of a metric whose value says nothing."""
        return dict(next(iter(self.series.get(metric, {})), Labels()))

    def since(self, before: Scrape) -> Scrape:
        """This scrape, with the counters' growth since another; since their start, if the process has begun anew."""
        if self.value(START) != before.value(START):
            return self
        series = dict(self.series)
        for metric, now in self.series.items():
            if metric.endswith(CUMULATIVE):
                old = before.series.get(metric, {})
                series[metric] = {key: v - old.get(key, 0.0) if v >= old.get(key, 0.0) else v for key, v in now.items()}
        return Scrape(self.time, series)


def read(text: str, at: float) -> Scrape:
    """
    Raises:
        ValueError: if the text has no metric of lte-scale.
    """
    series: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    if not any(name.startswith("lte_") for name in series):
        raise ValueError("answers, but with no metric of lte-scale")
    return Scrape(at, series)


class Fetcher:
    """Scrapes targets, never through a proxy."""

    def __init__(
        self,
        timeout: float,
        cafile: str | None = None,
        certificate: str | None = None,
        password_file: str | None = None,
    ) -> None:
        """
        Args:
            cafile: whose certificates to trust; None are those that the system trusts.
            certificate: PEM file of certificate and key for a target that asks for one.
            password_file: with a line user:password for the targets whose URL has none.

        Raises:
            ValueError: if a file cannot be used; naming the option.
        """
        self.timeout = timeout
        try:
            context = ssl.create_default_context(cafile=cafile)
        except OSError as error:
            raise ValueError(f"--cafile: cannot read certificates from {cafile} ({error})") from error
        try:
            if certificate:
                context.load_cert_chain(certificate)
        except OSError as error:
            raise ValueError(f"--cert: cannot read a certificate and its key from {certificate} ({error})") from error
        try:
            self.authorization = basic_auth(Path(password_file).read_text().strip()) if password_file else ""
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--password-file: cannot read {password_file} ({error})") from error
        self.opener = build_opener(ProxyHandler({}), HTTPSHandler(context=context))

    def __call__(self, target: Target) -> Scrape | str:
        """What the target says, or why it says nothing."""
        request = Request(target.url, headers={"Accept": "text/plain"})
        if authorization := target.authorization or self.authorization:
            request.add_unredirected_header("Authorization", authorization)
        try:
            with self.opener.open(request, timeout=self.timeout) as answer:
                text, date = answer.read().decode(), answer.headers.get("Date")
            return read(text, _clock(date))
        except HTTPError as error:
            return f"HTTP {error.code} {error.reason}"
        except URLError as error:
            return _reason(error.reason)
        except (OSError, HTTPException, ValueError) as error:
            return _reason(error)

    def close(self) -> None:
        self.opener.close()


def _reason(error: object) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _clock(date: str | None) -> float:
    """The target's time: this machine's, unless the whole seconds of its answer say that its clock is another."""
    here = time.time()
    try:
        there = parsedate_to_datetime(date).timestamp() if date else here
    except ValueError:
        return here
    return there if abs(there - here) > SKEW_SECONDS else here
