"""Every setting of the gateway, read once at start and passed down.

Precedence: command line (`--max-batch-size 8`), environment (`VMOE_MAX_BATCH_SIZE=8`), default. Defaults fit a laptop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.backends.triton.address import Address

_MIB = 1 << 20


class Settings(BaseSettings):
    """V-MoE gateway: classifies images over HTTP, with capacity factor and selected experts chosen per request.

    --version prints the version of this package.
    """

    model_config = SettingsConfigDict(
        env_prefix="VMOE_",
        frozen=True,
        cli_prog_name="python -m server",
        cli_kebab_case=True,
        cli_implicit_flags=True,
    )

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8080, ge=0, le=65535, description="TCP port to listen on")
    workers: int = Field(
        default=1,
        ge=1,
        description="processes that serve the port, each with an engine, a queue and a policy of its own; limits are "
        "of each. Not the batches that one of them runs at once, which /v1/policy has as workers. docs/workers.md",
    )
    model_repository: Path = Field(default=Path("model_repository"), description="directory that holds the bundles")
    model: str = Field(default="vmoe-fashion-mnist", description="name of the bundle to serve")
    also: str = Field(
        default="",
        description="further bundles of that model, separated by commas, such as its int8 one: their operating points "
        "join the ladder; embedded backend only",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="least severity logged")

    backend: Literal["embedded", "triton"] = Field(
        default="embedded", description="where batches run: in this process, or on Triton servers"
    )
    triton_urls: str = Field(
        default="127.0.0.1:8001",
        description="Triton servers, separated by commas: host:port (gRPC), grpc://host:port or http://host:port",
    )
    triton_timeout_s: float = Field(
        default=5.0, gt=0, description="longest that a batch may take on a Triton server, whatever its deadline"
    )
    triton_probe_s: float = Field(
        default=1.0, gt=0, description="time between probes of a Triton server, and for the answer to one"
    )
    triton_shared_memory: bool = Field(
        default=False, description="pass images to Triton servers in shared memory; all must run on this host"
    )
    fallback: Literal["none", "embedded"] = Field(
        default="none", description="what runs batches, at the cheapest points allowed, while no Triton server does"
    )
    threads: int = Field(
        default=0,
        ge=0,
        description="threads of one inference; 0 lets ONNX Runtime choose, and gives each of several workers its share "
        "of the cores",
    )
    spinning: bool = Field(
        default=True,
        description="threads of the embedded engine wait on their cores for one another: fast, unless others need them",
    )
    packed_weights: Path | None = Field(
        default=None,
        description="directory for the weights as the embedded engine maps them; gateways that name the same one share "
        "memory. Nobody else may write there",
    )
    decode_threads: int = Field(default=2, ge=1, description="images decoded at the same time, beside small ones")

    # Chosen, not tuned: large enough that per-call overhead is small, small enough that nobody waits long for a batch.
    max_batch_size: int = Field(default=16, ge=1, description="images per batch; the bundle's own limit applies too")
    policy: str = Field(
        default="",
        description="name of a capacity policy (foresight, fixed, queue-depth, aimd, slackfit, proteus) with default "
        "budgets, or path of a policy.toml; empty takes the bundle's policy.toml, or foresight where there is none",
    )
    force_policy: bool = Field(default=False, description="use a policy though it was tuned for another manifest")
    admin_key: SecretStr = Field(
        default=SecretStr(""), description="bearer token of /v1/admin; empty switches it off. Better set by environment"
    )

    record: Path | None = Field(
        default=None, description="file to write the arrivals of /classify to, as a trace for `python -m loadtest`"
    )
    record_max_bytes: int = Field(
        default=256 * _MIB, ge=1, description="size at which the recording ends; a row takes about 20 bytes"
    )

    max_queue_images: int = Field(default=512, ge=1, description="images admitted and not yet answered")
    max_queue_bytes: int = Field(
        default=256 * _MIB, ge=1, description="bytes held by uploads not yet answered, and by decoded images that wait"
    )

    max_image_bytes: int = Field(default=10 * _MIB, ge=1, description="size of one encoded image")
    # Chosen, not tuned. Flattening RGBA holds about 15 bytes a pixel (three RGBA images, one RGB): 375 MB per thread.
    max_image_pixels: int = Field(default=25_000_000, ge=1, description="width times height of one image")
    max_images_per_request: int = Field(default=64, ge=1, description="images in one multipart body")
    max_body_bytes: int = Field(default=64 * _MIB, ge=1, description="size of one multipart body")

    request_timeout_s: float = Field(
        default=10.0,
        gt=0,
        description="time for the upload, and again from its end to the answer; the longest deadline",
    )
    shutdown_delay_s: float = Field(
        default=0.0, ge=0, description="time to go on serving, unready, for load balancers to notice the shutdown"
    )
    drain_timeout_s: float = Field(default=20.0, ge=0, description="time for open requests to finish at shutdown")

    @property
    def triton_endpoints(self) -> tuple[str, ...]:
        return tuple(url.strip() for url in self.triton_urls.split(","))

    @property
    def also_models(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.also.split(",") if name.strip())

    @property
    def without_effect(self) -> tuple[str, ...]:
        """What was given and is ignored, because no batch goes to a Triton server."""
        if self.backend == "triton":
            return ()
        return tuple(sorted(n for n in self.model_fields_set if n.startswith("triton_") or n == "fallback"))

    @field_validator("host")
    @classmethod
    def _host_is_named(cls, host: str) -> str:
        if not host.strip():
            raise ValueError("it must be named: 127.0.0.1 for this machine alone, 0.0.0.0 for every interface")
        return host.strip()

    @field_validator("admin_key")
    @classmethod
    def _admin_key_can_be_sent(cls, key: SecretStr) -> SecretStr:
        given = key.get_secret_value()
        stripped = given.strip()  # a secret that comes from a file ends with a newline
        if given and not stripped:
            raise ValueError("it is blank; give a key, or leave the setting out to switch /v1/admin off")
        if not all(" " <= each <= "~" for each in stripped):
            raise ValueError("it must be printable ASCII, for it is sent in a header")
        return SecretStr(stripped)

    @model_validator(mode="after")
    def _several_bundles_are_embedded(self) -> Settings:
        if self.also_models and self.backend != "embedded":
            raise ValueError(f"also ({self.also}) needs backend embedded, got {self.backend}")
        return self

    @model_validator(mode="after")
    def _one_process_records(self) -> Settings:
        if self.record is not None and self.workers > 1:
            raise ValueError(f"record ({self.record}) needs workers 1, got {self.workers}: a trace has one writer")
        return self

    @model_validator(mode="after")
    def _endpoints_are_addresses(self) -> Settings:
        for url in self.triton_endpoints:
            try:
                Address.parse(url)
            except ValueError as error:
                raise ValueError(f"triton_urls: {error}") from error
        return self

    @model_validator(mode="after")
    def _limits_fit_together(self) -> Settings:
        if self.max_images_per_request > self.max_queue_images:
            raise ValueError(
                f"max_images_per_request ({self.max_images_per_request}) must not exceed max_queue_images "
                f"({self.max_queue_images}): such a request could never be admitted"
            )
        largest_body = max(self.max_body_bytes, self.max_image_bytes)
        if largest_body > self.max_queue_bytes:
            raise ValueError(
                f"max_body_bytes and max_image_bytes (up to {largest_body}) must not exceed max_queue_bytes "
                f"({self.max_queue_bytes}): such a request could never be admitted"
            )
        return self
