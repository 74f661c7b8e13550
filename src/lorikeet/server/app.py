"""The HTTP application: routes of both protocols, health, metrics, and every error in its protocol's shape."""

from __future__ import annotations

import logging

from fastapi import Depends, FastAPI, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.status import WS_1008_POLICY_VIOLATION as WS_POLICY_VIOLATION
from starlette.websockets import WebSocketState

from lorikeet import __version__
from lorikeet.errors import LorikeetError
from lorikeet.server import datasets, demo, jobs, keys, leaderboard, lorax, manage, openai, pages, repositories, serving
from lorikeet.server.auth import Access, needs, public
from lorikeet.server.compression import CompressJson
from lorikeet.server.metrics import MEDIA_TYPE
from lorikeet.server.predibase import routes as predibase
from lorikeet.server.replies import CLIENT_CLOSED_REQUEST, ClientGoneError, error_headers, json_reply
from lorikeet.server.state import ServerState
from lorikeet.server.validation import Body, objection

log = logging.getLogger("lorikeet.server")


def create_app(state: ServerState) -> FastAPI:
    """The application over an engine that somebody else starts and stops. Raises `ConfigError`.

    `state.access` is made here, and is to be closed by who serves the application.
    """
    platform = state.platform
    state.access = access = (
        Access(state.config) if platform is None else Access(state.config, platform.catalog, platform.run)
    )
    app = FastAPI(
        title="Lorikeet", version=__version__, docs_url=None, redoc_url=None, openapi_url=None,
        dependencies=[Depends(access.authorise)],
    )  # fmt: skip
    app.add_middleware(CompressJson)
    if state.config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=state.config.cors_origins, allow_headers=["authorization", "content-type"],
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
        )  # fmt: skip
    app.include_router(openai.routes(state))
    app.include_router(lorax.routes(state))
    app.include_router(manage.routes(state))
    if platform is not None:
        app.include_router(keys.routes(state, platform))
        app.include_router(repositories.routes(state, platform))
        app.include_router(datasets.routes(state, platform))
        app.include_router(jobs.routes(state, platform))
        app.include_router(demo.routes(state, platform))
        app.include_router(leaderboard.routes(state, platform))
        app.include_router(serving.routes(state))
        pages.add_pages(app)
        app.include_router(predibase.routes(state, platform))
    _add_health(app, state)
    _add_errors(app, state)
    return app


def _add_health(app: FastAPI, state: ServerState) -> None:
    def health() -> tuple[dict[str, object], int]:
        engine = state.engine
        last = engine.last_error
        body: dict[str, object] = {
            "status": "ready" if engine.ready else "not ready",
            "engine": {
                "ready": engine.ready,
                "alive": engine.alive,
                "restarts": engine.restarts,
                "in_flight": engine.in_flight,
                "error": None if last is None else last.message,
            },
        }
        return body, 200 if engine.ready else 503

    @app.get("/health")
    @app.get("/health/ready")
    @app.get("/ping")
    @public
    async def ready() -> Response:
        """200 while new requests are taken: not while the engine starts, nor while the server drains."""
        body, status = health()
        return json_reply(body, status, {"retry-after": "1"} if status == 503 else None)

    @app.get("/health/live")
    @public
    async def live() -> Response:
        """200 as long as the server itself works; a restart would not help an engine that is being restarted."""
        return json_reply({"status": "live"})

    @app.get("/metrics")
    @needs("user", operator=True)
    async def metrics() -> Response:
        return Response(await state.metrics.page(state.engine), media_type=MEDIA_TYPE)

    @app.get("/")
    @needs("user")
    async def root() -> Response:
        return json_reply(
            {
                "name": "lorikeet",
                "version": __version__,
                "base": state.models.base.name,
                "routes": ["/v1/models", "/v1/completions", "/v1/chat/completions", "/generate", "/generate_stream",
                           "/v1/adapters", "/health", "/metrics"],
            }
        )  # fmt: skip


def _add_errors(app: FastAPI, state: ServerState) -> None:
    def reply(request: Request, error: LorikeetError) -> Response:
        state.metrics.refused.labels(error.code).inc()
        path = request.url.path
        theirs = None if state.platform is None else predibase.error_shape(path)
        shape = theirs or (lorax.error_body if path in lorax.PATHS else openai.error_body)
        return json_reply(shape(error), error.status, error_headers(error))

    @app.exception_handler(LorikeetError)
    async def known(asked: Request | WebSocket, error: LorikeetError) -> Response | None:
        if isinstance(asked, Request):
            return reply(asked, error)
        await refuse_socket(asked, error)
        return None

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        code = {404: "unknown_route", 405: "wrong_method"}.get(error.status_code, "http_error")
        said = {404: f"there is no {where}", 405: f"{where} is not allowed"}.get(error.status_code, str(error.detail))
        lists = state.platform is None and error.status_code == 404  # else the page stands there
        told = LorikeetError(said, code=code, hint="GET / lists the routes" if lists else None)
        told.status = error.status_code
        return reply(request, told)

    @app.exception_handler(RequestValidationError)
    async def part_of_path(request: Request, error: RequestValidationError) -> Response:
        found = error.errors()[0]
        return reply(request, objection(Body, [found | {"loc": found["loc"][1:]}]))

    @app.exception_handler(ClientDisconnect)  # while its body was read
    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def refuse_socket(socket: WebSocket, error: LorikeetError) -> None:
        """As a plain reply where the protocol was not switched yet, and the server can send one; else by closing."""
        state.metrics.refused.labels(error.code).inc()
        if socket.application_state != WebSocketState.CONNECTING:
            await socket.close(WS_POLICY_VIOLATION, error.code)
        elif "websocket.http.response" in socket.scope.get("extensions", {}):
            body = json_reply(openai.error_body(error), error.status, error_headers(error))
            await socket.send_denial_response(body)
        else:
            await socket.close(WS_POLICY_VIOLATION)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        where = getattr(request.scope.get("route"), "path", "?")  # not the path itself, which may hold a token
        log.exception("%s %s failed", request.method, where, exc_info=error)
        told = LorikeetError("the server failed to answer; its log has the details", hint="please report it")
        return reply(request, told)
