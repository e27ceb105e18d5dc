"""What Prometheus reads."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """Counts of this server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter("sdjax_requests", "HTTP requests", ["api", "status"], registry=registry)
        self._pictures = Counter("sdjax_pictures", "Pictures that ended", ["state"], registry=registry)
        self._seconds = Histogram(
            "sdjax_picture_seconds", "From the request to the picture", registry=registry, buckets=SECONDS
        )

    def request(self, api: str, status: int) -> None:
        """Counts an HTTP request."""
        self._requests.labels(api, str(status)).inc()

    def picture(self, state: str, seconds: float) -> None:
        """Counts a picture that has ended."""
        self._pictures.labels(state).inc()
        if state == "done":
            self._seconds.observe(seconds)

    def watch(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Shows a number as it is when it is asked for."""
        Gauge(name, help, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
