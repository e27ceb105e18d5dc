"""The application: the APIs, the page, what watches the server."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdjax.engine import QueueFull
from sdjax.fields import encodable
from sdjax.serve import native, openai, web_ui, web_ui_controlnet
from sdjax.serve.errors import GONE, INVALID, NO_MODEL, body_of, status_of
from sdjax.serve.held import Busy
from sdjax.serve.metrics import Metrics
from sdjax.serve.models import UnknownModel
from sdjax.serve.security import RETRY, Guard, Rules
from sdjax.serve.studio import Ending, Failed, Studio
from sdjax.serve.warming import warm

OPEN = ("/", "/docs", "/health", "/ready")
"""What is answered without a key, as are the files of the page"""
PAGE = Path(__file__).parent / "page"
POLICY = "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; frame-ancestors {}"
STATUS = {
    ValueError: INVALID,
    QueueFull: 429,
    Busy: 429,
    Failed: 500,
    Ending: 503,
    ClientDisconnect: GONE,
    HTTPException: None,
}
"""Of answers, by exceptions"""
APIS = {"sdapi": "web_ui", "controlnet": "web_ui", "v1": "openai"}


def create(studio: Studio, rules: Rules) -> FastAPI:
    """The application of a server."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(warm(studio))
        yield
        warming.cancel()

    app = FastAPI(title="sdjax", version=version("sdjax"), lifespan=lifespan, docs_url=None, redoc_url=None)
    for api in (native, web_ui, web_ui_controlnet, openai):
        app.include_router(api.router(studio))
    _watched(app, studio)
    for error, status in STATUS.items():
        app.exception_handler(error)(_answer(status))
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(Exception)(_broken)
    if PAGE.is_dir():
        page = _Page(rules.hosts, directory=PAGE, html=True)
        app.get("/docs", include_in_schema=False)(_docs(page))
        app.mount("/", page)
    app.add_middleware(_Counted, metrics=studio.metrics)
    app.add_middleware(Guard, rules=replace(rules, open=frozenset([*OPEN, *_page_files()])))
    return app


def _page_files() -> list[str]:
    return [f"/{path.relative_to(PAGE).as_posix()}" for path in PAGE.rglob("*") if path.is_file()]


class _Page(StaticFiles):
    """The files of the page, which may load nothing from elsewhere, and be within pages of these hosts alone."""

    def __init__(self, hosts: tuple[str, ...], **options: Any):
        super().__init__(**options)
        around = ("*" * host.startswith(".") + host for host in hosts)  # in CSP *.example.com is all below
        self._policy = POLICY.format(" ".join(["'self'", *around]))

    async def get_response(self, path: str, scope: dict) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Content-Security-Policy"] = self._policy
        return response


def _docs(page: _Page) -> Callable[[HTTPRequest], Awaitable[Response]]:
    async def docs(http: HTTPRequest) -> Response:
        return await page.get_response("docs.html", http.scope)

    return docs


def _watched(app: FastAPI, studio: Studio) -> None:
    """Adds what watches the server."""
    for name, help, value in (
        ("sdjax_waiting", "Pictures that wait", lambda: _waiting(studio)),
        ("sdjax_running", "Pictures under way", lambda: _jobs(studio) - _waiting(studio)),
        ("sdjax_models", "Models that are loaded", lambda: len(studio.models.engines)),
        ("sdjax_ready", "Whether the usual programs are compiled", lambda: studio.is_warm),
    ):
        studio.metrics.watch(name, help, value)

    @app.get("/health", tags=["server"])
    async def health() -> dict[str, str]:
        """That it answers."""
        return {"status": "ok", "version": version("sdjax")}

    @app.get("/ready", tags=["server"])
    async def ready(response: Response) -> dict[str, bool]:
        """Whether the usual programs are compiled, or could not be, which `warmed` tells: 200, else 503."""
        response.status_code = 200 if studio.is_warm else 503
        return {"ready": studio.is_warm, "warmed": studio.has_warmed}

    @app.get("/metrics", tags=["server"], response_class=Response)
    def metrics() -> Response:
        """For Prometheus."""
        return Response(studio.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _jobs(studio: Studio) -> int:
    return sum(len(engine.jobs) for engine in studio.models.engines)


def _waiting(studio: Studio) -> int:
    return sum(not job.begun for engine in studio.models.engines for job in engine.jobs)


class _Counted:
    """Middleware that counts requests."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                api = APIS.get(scope["path"].lstrip("/").partition("/")[0], "native")
                self._metrics.request(api, message["status"])
            await send(message)

        await self._app(scope, receive, counted)


def _answer(status: int | None) -> Callable[[HTTPRequest, Exception], Awaitable[JSONResponse]]:
    """How an exception is answered, as each API does."""

    async def answer(http: HTTPRequest, error: Exception) -> JSONResponse:
        known = isinstance(error, HTTPException)
        code, detail = (error.status_code, str(error.detail)) if known else (status, one_line(error))
        headers = dict(error.headers or {}) if known else {"Retry-After": RETRY} if status == 429 else {}
        path = http.url.path
        named = NO_MODEL if isinstance(error, UnknownModel) else None
        return JSONResponse(body_of(path, code, detail, named), status_of(path, code), headers=headers)

    return answer


async def _invalid(http: HTTPRequest, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    detail = f"{first['loc'][-1]}: {first['msg']}"
    path = http.url.path
    return JSONResponse(body_of(path, INVALID, detail), status_of(path, INVALID))


async def _broken(http: HTTPRequest, error: Exception) -> JSONResponse:
    """Of what nobody thought of, which the log has."""
    return JSONResponse(body_of(http.url.path, 500, "the server failed; its log says how"), 500)


def one_line(error: Exception) -> str:
    """The message of an exception in one line."""
    return encodable(" ".join(str(error).split()))
