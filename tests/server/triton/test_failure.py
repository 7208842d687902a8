"""Messages are those of tritonserver 2.51 and gRPC 1.67; that of the full queue is from Triton's source."""

from __future__ import annotations

import pytest

from server.backends.triton.failure import Failure, Reason, classify, may_retry


@pytest.mark.parametrize(
    ("code", "message", "reason"),
    [
        ("NOT_FOUND", "Request for unknown model: 'nope' is not found", "not_ready"),
        ("UNAVAILABLE", "Request for unknown model: 'vmoe' has no available versions", "not_ready"),
        ("UNAVAILABLE", "Request timeout expired", "timeout"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", "timeout"),
        ("UNAVAILABLE", "Exceeds maximum queue size", "queue_full"),
        ("UNAVAILABLE", "Socket closed", "connection"),
        (
            "UNAVAILABLE",
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:21811: Failed to connect to "
            "remote host: connect: Connection refused (111)",
            "refused",
        ),
        ("INVALID_ARGUMENT", "inference request batch-size must be <= 32 for 'vmoe-fashion-mnist'", "model"),
        ("INTERNAL", "Failed to process the request(s) for model instance", "model"),
        ("CANCELLED", "", "connection"),
    ],
)
def test_classify_when_a_status_comes_then_it_has_a_reason(code: str, message: str, reason: str) -> None:
    assert classify(f"StatusCode.{code}", message) == reason


@pytest.mark.parametrize(
    ("status", "message", "reason"),
    [
        ("404", "Request for unknown model: 'nope' is not found", "not_ready"),
        ("503", "Request for unknown model: 'vmoe' has no available versions", "not_ready"),
        ("503", "Exceeds maximum queue size", "queue_full"),
        ("503", "Request timeout expired", "timeout"),
        ("502", "an exception occurred in the client while decoding the response", "connection"),
        ("504", "upstream request timeout", "timeout"),
        ("499", "", "connection"),
        ("400", "inference request batch-size must be <= 32 for 'vmoe-fashion-mnist'", "model"),
        ("500", "Failed to process the request(s) for model instance", "model"),
    ],
)
def test_classify_when_a_status_of_http_comes_then_it_has_the_same_reasons(
    status: str, message: str, reason: str
) -> None:
    assert classify(status, message) == reason


@pytest.mark.parametrize("reason", ["refused", "connection", "hung", "not_ready", "queue_full"])
def test_retry_when_the_endpoint_failed_and_time_is_left_then_yes(reason: Reason) -> None:
    failure = Failure(reason, "")
    assert may_retry(failure, now=1.0, deadline_s=1.5, expected_s=0.5)
    assert not may_retry(failure, now=1.0, deadline_s=1.4, expected_s=0.5)


@pytest.mark.parametrize("reason", ["timeout", "model"])
def test_retry_when_time_is_up_or_the_batch_is_to_blame_then_no(reason: Reason) -> None:
    assert not may_retry(Failure(reason, ""), now=1.0, deadline_s=9.0, expected_s=0.5)
