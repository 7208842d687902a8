"""LitServe with batching: `python -m tests.benchmarks.peers.litserve_peer PORT BATCH_TIMEOUT_MS`.

HTTP in one process, decoding and inference in another, a third holds the queue between them. It takes the fast queue
that LitServe advises above 100 requests per second, and the image as the raw body: the parameter of `decode_request`
decides how FastAPI reads a request. LitServe reads that annotation as a value and pickles the class, so both are plain.
"""

import sys
from typing import Annotated, Any

import litserve
import numpy as np
import numpy.typing as npt
from fastapi import Depends, Request

from tests.benchmarks.live_gateway import MAX_BATCH_SIZE
from tests.benchmarks.peers.classifier import HOST, Classifier


async def body_of(request: Request) -> bytes:
    return await request.body()


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.classifier = Classifier()

    def decode_request(self, request: Annotated[bytes, Depends(body_of)]) -> npt.NDArray[np.uint8]:
        return self.classifier.decode(request)

    def batch(self, inputs: list[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
        return np.stack(inputs)

    def predict(self, x: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return self.classifier.infer(x)

    def unbatch(self, output: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        return list(output)

    def encode_response(self, output: npt.NDArray[np.float32]) -> dict[str, Any]:
        return self.classifier.describe(output)


if __name__ == "__main__":
    port, batch_timeout_s = int(sys.argv[1]), float(sys.argv[2]) / 1000
    api = Api(max_batch_size=MAX_BATCH_SIZE, batch_timeout=batch_timeout_s, api_path="/classify")
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1, fast_queue=True)
    server.run(host=HOST, port=port, generate_client_file=False, log_level="warning", access_log=False)
