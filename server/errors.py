"""Failures of a request. The class fixes the HTTP status and a stable code, the message says what was wrong.

    GatewayError
    ├── ImageError                    one image of a request; the others still get their answers
    │   ├── NotAnImage                400 not_an_image
    │   ├── BrokenImage               400 broken_image
    │   ├── ImageTooLarge             413 image_too_large
    │   ├── TooManyPixels             413 too_many_pixels
    │   └── UnsupportedMediaType      415 unsupported_media_type (also of a whole body)
    ├── MalformedBody                 400 malformed_body
    ├── NoImage                       400 no_image
    ├── UploadTimeout                 408 upload_timeout
    ├── BodyTooLarge                  413 body_too_large
    ├── Unauthorized                  401 unauthorized
    ├── InvalidParameter              422 invalid_parameter
    ├── InvalidPolicy                 422 invalid_policy
    ├── ClientGone                    499 client_gone (nobody reads it; it counts in the metrics)
    ├── InferenceFailed               500 inference_failed
    ├── Unavailable                   503, with Retry-After
    │   ├── NotReady                  503 not_ready
    │   ├── Overloaded                503 overloaded
    │   ├── OverShare                 503 over_share
    │   ├── QueueFull                 503 queue_full
    │   ├── BackendUnavailable        503 backend_unavailable
    │   └── ShuttingDown              503 shutting_down
    └── DeadlineExceeded              504 deadline_exceeded

`problems` renders them as application/problem+json.
"""

from __future__ import annotations

import math
from typing import ClassVar


class GatewayError(Exception):
    """A request, or one image of it, that gets no classification.

    Attributes:
        status: HTTP status.
        code: stable name for programs.
        title: the same for people; does not change from one occurrence to the next.
        retry_after_s: when trying again makes sense, None when it does not.
    """

    status: ClassVar[int]
    code: ClassVar[str]
    title: ClassVar[str]
    retry_after_s: int | None = None


class ImageError(GatewayError):
    """The fault lies in one image."""


class NotAnImage(ImageError):
    status, code, title = 400, "not_an_image", "Not an image"


class BrokenImage(ImageError):
    status, code, title = 400, "broken_image", "Broken or truncated image"


class ImageTooLarge(ImageError):
    status, code, title = 413, "image_too_large", "Image has too many bytes"


class TooManyPixels(ImageError):
    status, code, title = 413, "too_many_pixels", "Image has too many pixels"


class UnsupportedMediaType(ImageError):
    status, code, title = 415, "unsupported_media_type", "Unsupported media type"


class MalformedBody(GatewayError):
    status, code, title = 400, "malformed_body", "Malformed request body"


class NoImage(GatewayError):
    status, code, title = 400, "no_image", "No image in the request"


class UploadTimeout(GatewayError):
    status, code, title = 408, "upload_timeout", "Upload took too long"


class BodyTooLarge(GatewayError):
    status, code, title = 413, "body_too_large", "Request body has too many bytes"


class Unauthorized(GatewayError):
    status, code, title = 401, "unauthorized", "Unauthorized"


class InvalidParameter(GatewayError):
    status, code, title = 422, "invalid_parameter", "Invalid parameter"


class InvalidPolicy(GatewayError):
    status, code, title = 422, "invalid_policy", "Invalid policy"


class ClientGone(GatewayError):
    status, code, title = 499, "client_gone", "Client closed the connection"


class InferenceFailed(GatewayError):
    status, code, title = 500, "inference_failed", "Inference failed"


class Unavailable(GatewayError):
    """The gateway cannot take this request now.

    Arguments:
        retry_after_s: when there will be room. The header counts whole seconds, so that one second is the least; it is
            also the default (chosen, not tuned: many batches fit into it).
    """

    retry_after_s: int = 1

    def __init__(self, detail: str, retry_after_s: float = 1.0) -> None:
        super().__init__(detail)
        self.retry_after_s = max(1, math.ceil(retry_after_s))


class NotReady(Unavailable):
    status, code, title = 503, "not_ready", "Not ready"


class Overloaded(Unavailable):
    status, code, title = 503, "overloaded", "Overloaded: the deadline cannot be met"


class OverShare(Unavailable):
    status, code, title = 503, "over_share", "Overloaded: the budget has used up its share"


class QueueFull(Unavailable):
    status, code, title = 503, "queue_full", "Queue is full"


class BackendUnavailable(Unavailable):
    status, code, title = 503, "backend_unavailable", "No inference server is available"


class ShuttingDown(Unavailable):
    status, code, title = 503, "shutting_down", "Shutting down"


class DeadlineExceeded(GatewayError):
    status, code, title = 504, "deadline_exceeded", "Deadline exceeded"
