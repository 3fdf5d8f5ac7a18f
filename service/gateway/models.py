"""`/v1/models`: what is served."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.gateway.answer_schema import ModelCard, ModelList
from service.gateway.gateway import gateway_of
from service.gateway.openapi import errors
from service.gateway.plan import resolve_model
from service.gateway.responses import json_response
from service.gateway.served_model import ServedModel

router = APIRouter()


@router.get("/v1/models", response_model=None, responses={200: {"model": ModelList}, **errors(401, 500)})
async def list_models(request: Request) -> Response:
    """All served names."""
    served = gateway_of(request).served
    return json_response(ModelList(data=[_card(name, served) for name in served.names]))


@router.get(
    "/v1/models/{model_id:path}", response_model=None, responses={200: {"model": ModelCard}, **errors(401, 404, 500)}
)
async def get_model(request: Request, model_id: str) -> Response:
    """One served name."""
    served = gateway_of(request).served
    return json_response(_card(resolve_model(model_id, served), served))


def _card(name: str, served: ServedModel) -> ModelCard:
    return ModelCard(id=name, created=served.created, max_model_len=served.info.max_model_len)
