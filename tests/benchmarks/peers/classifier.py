"""What the peers serve: the shipped graph at its full operating point, called as its documentation would suggest."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from exporter.bundle import Bundle
from exporter.session import open_session, run
from tests.benchmarks.live_gateway import BUNDLE
from vmoe.preprocess import fit

HOST = "127.0.0.1"
THREADS = 1  # of one inference, as `live_gateway` gives ours


class Classifier:
    """Decodes as the gateway does, infers, and answers the most probable class."""

    def __init__(self) -> None:
        bundle = Bundle.load(BUNDLE)
        self._manifest = bundle.manifest
        self._session = open_session(bundle.model_path, THREADS)

    def decode(self, body: bytes) -> npt.NDArray[np.uint8]:
        """(H, W, c)"""
        return fit(Image.open(BytesIO(body)), self._manifest.preprocessing)

    def infer(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """(B, H, W, c) -> logits (B, classes)."""
        (logits,) = run(self._session, images, self._manifest.points[-1], ["logits"])
        return logits.astype(np.float32, copy=False)

    def describe(self, logits: npt.NDArray[np.float32]) -> dict[str, Any]:
        """The answer to one image. What the load generator reads beside the class is constant."""
        weights = np.exp(logits - logits.max())
        best = int(logits.argmax())
        probability = float(weights[best] / weights.sum())
        return {
            "predictions": [{"index": best, "label": self._manifest.labels[best], "probability": probability}],
            "operating_point": None,
            "reason": "pinned",
            "deadline_met": True,
            "times": dict.fromkeys(("decode_ms", "queue_ms", "inference_ms", "total_ms"), 0.0),
        }
