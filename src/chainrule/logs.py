"""Structured logs: one JSON object a line, for the events that the library logs.

Loggers: `chainrule.tiers` (`tier_transition`, by `chainrule.retier`), `chainrule.gate` (`gate`, by the torch bridge; a
jitted chain cannot log, its gate is in `chainrule.metrics`) and `chainrule.routing` (`routing`, by
`transforms.Routing`, each plan once). All log at INFO, with the event's numbers in the record's `event`.
"""

import datetime
import json
import logging


class JsonFormatter(logging.Formatter):
    """Formats a log record as one line of JSON: time, level, logger, event, and the event's numbers.

    >>> import sys
    >>> handler = logging.StreamHandler(sys.stdout)
    >>> handler.setFormatter(JsonFormatter())
    >>> logger = logging.getLogger("chainrule.doctest")
    >>> logger.addHandler(handler)
    >>> logger.setLevel(logging.INFO)
    >>> logger.info("gate", extra={"event": {"step": 3, "gate_scale": 0.5}})  # doctest: +ELLIPSIS
    {"time": "...", "level": "INFO", "logger": "chainrule.doctest", "event": "gate", "step": 3, "gate_scale": 0.5}
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, without a line break at its end."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        entry = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "event", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)
