"""An answer as JSON."""

import msgspec
from starlette.responses import Response


def json_response(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
