"""Errors, as the API of a path says them."""

from typing import Any

OPENAI = "/v1/"
INVALID = 422
NO_MODEL = "model_not_found"
"""OpenAI's code for it"""
GONE = 499  # of an answer that nobody waits for, as nginx has it


def status_of(path: str, status: int) -> int:
    """OpenAI's says 400 of what is wrong with a request."""
    return 400 if path.startswith(OPENAI) and status == INVALID else status


def body_of(path: str, status: int, detail: str, code: str | None = None) -> dict[str, Any]:
    """The body of an answer that says what is wrong. code: OpenAI's, if it has one for it."""
    if not path.startswith(OPENAI):
        return {"detail": detail}
    kind = "server_error" if status >= 500 else "invalid_request_error"
    field, colon, _ = detail.partition(": ")
    is_field = colon and " " not in field
    return {"error": {"message": detail, "type": kind, "param": field if is_field else None, "code": code}}
