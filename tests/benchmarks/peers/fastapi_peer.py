"""FastAPI, a thread pool and one session, no batches: `python -m tests.benchmarks.peers.fastapi_peer PORT`."""

from __future__ import annotations

import sys
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool

from tests.benchmarks.peers.classifier import HOST, Classifier


def create_app() -> FastAPI:
    app, classifier = FastAPI(), Classifier()

    def answer(body: bytes) -> dict[str, Any]:
        return classifier.describe(classifier.infer(classifier.decode(body)[None])[0])

    @app.post("/classify")
    async def classify(request: Request) -> dict[str, Any]:
        return await run_in_threadpool(answer, await request.body())

    @app.get("/health")
    async def health() -> str:
        return "ok"

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(), host=HOST, port=int(sys.argv[1]), log_level="warning", access_log=False)
