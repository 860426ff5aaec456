"""The gateway's Prometheus metrics."""

import functools

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_REQUEST_SECONDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_INTER_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """All metrics of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter = functools.partial(Counter, registry=self.registry)
        gauge = functools.partial(Gauge, registry=self.registry)
        histogram = functools.partial(Histogram, registry=self.registry)
        self.requests = counter(
            "nanochat_gateway_requests_total",
            "HTTP requests; status 499 is a client that left before the end",
            ("route", "status"),
        )
        self.request_seconds = histogram(
            "nanochat_gateway_request_duration_seconds",
            "Time from a request's arrival to the end of its answer",
            ("route",),
            buckets=_REQUEST_SECONDS,
        )
        self.in_flight = gauge("nanochat_gateway_requests_in_flight", "HTTP requests being answered")
        self.first_token_seconds = histogram(
            "nanochat_gateway_time_to_first_token_seconds",
            "Time from a request's arrival to its first token from an engine",
            buckets=_FIRST_TOKEN_SECONDS,
        )
        self.inter_token_seconds = histogram(
            "nanochat_gateway_inter_token_latency_seconds",
            "Time between two tokens of a choice as they come from an engine",
            buckets=_INTER_TOKEN_SECONDS,
        )
        self.prompt_tokens = counter("nanochat_gateway_prompt_tokens_total", "Tokens of prompts sent to engines")
        self.generation_tokens = counter(
            "nanochat_gateway_generation_tokens_total", "Tokens of answers received from engines, tool output included"
        )
        self.finished = counter(
            "nanochat_gateway_choices_finished_total", "Choices by the reason for their end", ("finish_reason",)
        )
        self.failovers = counter(
            "nanochat_gateway_failovers_total",
            "Requests sent to another engine because the first one could not take them",
        )
        self.engine_up = gauge(
            "nanochat_gateway_engine_up", "1 while an engine is healthy and its model is known", ("address",)
        )
