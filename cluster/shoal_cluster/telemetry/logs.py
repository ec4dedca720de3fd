"""Logs: structured events, one JSON object a line. Never query text, vectors or payload."""

import logging

import structlog


def configure_logging(*, cluster: str, actor: str) -> None:
    """Sends this process's events to standard output, which Ray keeps and rotates per process.

    cluster, actor: bound to every event.
    """
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(cluster=cluster, actor=actor)
