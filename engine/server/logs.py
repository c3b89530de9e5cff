"""Logs on stderr: lines for people on a terminal, JSON for everything else."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

FORMATS = ("auto", "json", "text")
_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "color_message"}
# Of a response's line for people: the request's id and the client are in the JSON line.
_LEFT_OUT = frozenset({"request_id", "client", "method", "path", "status", "ms", "prompt_tokens", "generated_tokens"})


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """Fields that the call gave as `extra`."""
    return {name: value for name, value in vars(record).items() if name not in _PLAIN}


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and what the call gave as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _extra(record)
        if record.exc_info:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """Time, what happened, and what the call gave as `extra`, a response in the order in which one reads it."""

    def format(self, record: logging.LogRecord) -> str:
        extra = _extra(record)
        level = "" if record.levelno <= logging.INFO else record.levelname + ": "
        said = [f"{datetime.fromtimestamp(record.created):%H:%M:%S} {level}{record.getMessage()}"]
        if "method" in extra:
            said[0] += f" {extra['method']} {extra['path']} {extra['status']} in {extra['ms']:.0f} ms"
            if "prompt_tokens" in extra:
                said.append(f"{extra['prompt_tokens']} + {extra.get('generated_tokens', 0)} tokens")
            extra = {name: value for name, value in extra.items() if name not in _LEFT_OUT}
        for name, value in extra.items():
            said.append(f"{name} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}")
        # A path or a header is the client's: it may move no cursor.
        line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in ", ".join(said))
        if record.exc_info:
            line += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
        return line


def is_text(form: str) -> bool:
    """Whether logs of a form are for people: "auto" is that on a terminal.

    Raises:
        ValueError: There is no such form.
    """
    if form not in FORMATS:
        raise ValueError(f"log_format = {form!r}; it must be one of {', '.join(FORMATS)}")
    return form == "text" or (form == "auto" and sys.stderr.isatty())


def log_to_stderr(level: str = "info", form: str = "json") -> None:
    """Write the logs of the server and of uvicorn to stderr.

    Raises:
        ValueError: There is no such level or form.
    """
    if level not in ("debug", "info", "warning", "error"):
        raise ValueError(f"log_level = {level!r}; it must be debug, info, warning or error")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextLines() if is_text(form) else JsonLines())
    # The connection says that better, and once.
    handler.addFilter(lambda record: record.msg != "Invalid HTTP request received.")
    for name, least in (("engine", logging.DEBUG), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(max(logging.getLevelNamesMapping()[level.upper()], least))


def show_summary(facts: Mapping[str, Any]) -> None:
    """Write what is served, where and within which limits to stderr, as a table."""
    from rich.console import Console
    from rich.table import Table

    timeout = facts["request_timeout"]
    size = f"{facts['parameters'] / 1e6:,.1f} M parameters"
    rows = {
        "model": f"{', '.join(facts['models'])}: {facts['architecture']}, {size}",
        "device": f"{facts['device']}, {facts['dtype']}, backend {facts['backend']}",
        "context": f"{facts['max_model_len']:,} tokens",
        "KV cache": f"{facts['kv_tokens']:,} tokens, {facts['kv_bytes'] / 1e9:.2f} GB when all are in use",
        "batch": f"{facts['max_batch']:,} requests, {facts['max_step_tokens']:,} tokens in a pass",
        "limits": f"{facts['max_waiting']:,} requests that wait, {facts['max_connections']:,} connections, "
        f"bodies of {facts['max_body'] / 2**20:g} MiB, {f'{timeout:g} s' if timeout else 'any time'} for a request",
        "page": facts["url"],
        "API": f"{facts['url']}/v1",
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    Console(file=sys.stderr, highlight=False, markup=False).print(table)
