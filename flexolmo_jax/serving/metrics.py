"""What Prometheus reads of a server; counts and durations only, no text and no key."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from flexolmo_jax.serving.sources import Sources

SECONDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self._registry, self._of_experts = CollectorRegistry(), CollectorRegistry()
        own = self._registry
        self._requests = Counter(
            "flexolmo_requests", "Requests by their answer.", ["route", "status"], registry=own
        )
        self._tokens = Counter("flexolmo_tokens", "Tokens by kind.", ["kind"], registry=own)
        self._shares = Counter(
            "flexolmo_expert_tokens",
            "Generated tokens by the experts' shares in them.",
            ["expert"],
            registry=self._of_experts,
        )
        self._first = Histogram(
            "flexolmo_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=SECONDS,
            registry=own,
        )
        self._whole = Histogram(
            "flexolmo_request_seconds", "Duration of requests.", buckets=SECONDS, registry=own
        )
        self._revoked = Gauge(
            "flexolmo_expert_revoked",
            "Experts in memory that are not used, since they were revoked.",
            ["expert"],
            registry=self._of_experts,
        )
        self._refused = Gauge(
            "flexolmo_model_refused", "Whether the whole model may not be used.", registry=own
        )
        self._in_flight = Gauge(
            "flexolmo_requests_in_flight", "Requests that run or wait.", registry=own
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Counts an answered request."""
        self._requests.labels(route, str(status)).inc()
        self._whole.observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Counts the wait for a first token."""
        self._first.observe(seconds)

    def read(self, tokens: int) -> None:
        """Counts tokens of prompts."""
        self._tokens.labels("prompt").inc(tokens)

    def generated(self, tokens: int, shares: Mapping[str, float]) -> None:
        """Counts tokens of a continuation, and the experts' shares in them."""
        self._tokens.labels("generated").inc(tokens)
        for name, share in shares.items():
            self._shares.labels(name).inc(share * tokens)

    def text(self, in_flight: int, sources: Sources, with_experts: bool) -> bytes:
        """In Prometheus' format."""
        self._in_flight.set(in_flight)
        self._refused.set(sources.refused is not None)
        self._revoked.clear()
        for name in sources.revoked:
            self._revoked.labels(name).set(1)
        text = generate_latest(self._registry)
        return text + generate_latest(self._of_experts) if with_experts else text
