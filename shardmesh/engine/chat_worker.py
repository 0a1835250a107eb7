"""The process in which chat templates run; see `engine.chat`.

A template is a program of whoever made the model file.  Jinja's sandbox keeps it from reaching
anything; this process, with bounded memory and killed from outside when it takes too long, keeps
it from using everything.  Requests and answers are lines of JSON.
"""

from __future__ import annotations

import datetime
import functools
import json
import sys
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.sandbox

from shardmesh.confinement import confine
from shardmesh.wire.limits import CHAT_PROCESS_BYTES_MAX, CHAT_RENDERED_CHARS_MAX


class TemplateError(Exception):
    """The template called `raise_exception`: it wants to tell the person something."""


def main() -> None:
    """Answers requests from standard input until it ends."""
    confine(CHAT_PROCESS_BYTES_MAX)
    for line in sys.stdin:
        answer = json.dumps(_answer(json.loads(line)))
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def _answer(request: dict[str, Any]) -> dict[str, str]:
    """`{"text": ...}`, or `{"error": a clause that says what the template did}`."""
    try:
        text = _compile(request["template"]).render(request["variables"])
    except TemplateError as error:
        return {"error": f"refused the messages: {str(error)[:200]}"}
    except jinja2.exceptions.SecurityError as error:
        return {"error": f"tried something forbidden: {str(error)[:200]}"}
    except MemoryError:
        return {"error": "took too much memory"}
    except Exception as error:  # noqa: BLE001 - a stranger's program can raise anything
        return {"error": f"failed: {type(error).__name__}: {str(error)[:200]}"}
    if len(text) > CHAT_RENDERED_CHARS_MAX:
        return {"error": f"gave more than {CHAT_RENDERED_CHARS_MAX} characters"}
    return {"text": text}


@functools.lru_cache(maxsize=4)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object = "") -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


if __name__ == "__main__":
    main()
