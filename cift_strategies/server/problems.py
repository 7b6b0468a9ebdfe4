"""Errors as problem details (RFC 9457): one form for everything that goes wrong, from a wrong field to a node that is away."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from cift_strategies.server.link import Refused, Unanswered

MEDIA: Final = "application/problem+json"


class FieldError(BaseModel):
    where: Annotated[str, Field(examples=["body.events.3.price"])]
    what: Annotated[str, Field(examples=["Input should be a valid number"])]


class Problem(BaseModel):
    """What went wrong, for programs (`status`, `title`) and people (`detail`)."""

    type: str = "about:blank"
    title: Annotated[str, Field(examples=["Not Found"])]
    status: Annotated[int, Field(examples=[404])]
    detail: Annotated[str, Field(examples=["no instrument XYZ.XNAS here; there are AAPL.XNAS"])]
    errors: Annotated[list[FieldError], Field(description="the fields that are wrong")] = []


class Fault(Exception):
    """Answered with a problem of `status`."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}


def problem(status: int, detail: str, errors: list[FieldError] | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    told = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, errors=errors or [])
    return JSONResponse(told.model_dump(), status, headers, MEDIA)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problems that a route may answer with, for OpenAPI."""
    content = {MEDIA: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {s: {"description": HTTPStatus(s).phrase, "content": content} for s in sorted({400, 429, *statuses})}


def install(app: FastAPI) -> None:
    @app.exception_handler(Fault)
    async def _fault(_request: Request, error: Fault) -> JSONResponse:
        return problem(error.status, error.detail, headers=error.headers)

    @app.exception_handler(Unanswered)
    async def _unanswered(_request: Request, error: Unanswered) -> JSONResponse:
        return problem(503 if error.gone else 504, str(error))

    @app.exception_handler(Refused)
    async def _refused(_request: Request, error: Refused) -> JSONResponse:
        return problem(500 if error.ours else 409, str(error))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        headers, said = dict(error.headers or {}), str(error.detail)
        if said == HTTPStatus(error.status_code).phrase:  # of a path or a method that there is not
            path, allowed = request.url.path[:200], headers.get("Allow")
            said = f"{path} takes {allowed}" if allowed else f"there is no {path}: /openapi.json lists what there is"
        return problem(error.status_code, said, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        found = [FieldError(where=".".join(str(x) for x in e["loc"]), what=e["msg"]) for e in error.errors()[:20]]
        first = found[0] if found else FieldError(where="body", what="invalid")
        status = 400 if any(e["type"] == "json_invalid" for e in error.errors()) else 422
        return problem(status, f"{first.where}: {first.what}", found)

    @app.exception_handler(Exception)
    async def _ours(_request: Request, error: Exception) -> JSONResponse:
        return problem(500, f"the server failed: {type(error).__name__}; its log has more")
