"""The application: OpenAI's endpoints, and those of this package, over a worker."""

import asyncio
from contextlib import asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from transformers import PreTrainedTokenizerBase

from . import deciding, infilling, responding, revising, writing
from .edge import BodyLimit, RequestLog
from .errors import install_handlers
from .service import PATIENCE, ServerOptions, Service
from .worker import Worker


def build_app(
    worker: Worker, tokenizer: PreTrainedTokenizerBase, name: str, options: ServerOptions | None = None
) -> FastAPI:
    """The application that serves the worker's model under `name`. The worker is closed when the application ends."""
    options = ServerOptions() if options is None else options
    service = Service(worker, tokenizer, name, options)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    app = FastAPI(title="illada", lifespan=lifespan, docs_url=None, redoc_url=None)
    install_handlers(app)
    app.include_router(_state_routes(service))
    app.include_router(_model_routes(service), dependencies=[Depends(service.check_key)])
    for endpoints in (writing, responding, infilling, revising, deciding):
        app.include_router(endpoints.routes(service), dependencies=[Depends(service.check_key)])
    app.add_middleware(BodyLimit, max_bytes=options.max_body_bytes, timeout=options.timeout or PATIENCE)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(RequestLog, metrics=service.metrics)
    return app


def _state_routes(service: Service) -> APIRouter:
    """What monitors ask, without a key: neither waits for the model."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        is_alive = service.worker.is_alive
        return JSONResponse({"status": "ok" if is_alive else "the worker has ended"}, 200 if is_alive else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    return router


def _model_routes(service: Service) -> APIRouter:
    """The one model."""
    router = APIRouter()
    card = {"id": service.name, "object": "model", "created": service.created, "owned_by": "illada"}

    @router.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [card]}

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> dict:
        service.check_model(model)
        return card

    return router
