r"""A real Triton server for tests and for `make serve-triton`: the binary that the wheel nvidia-pytriton carries.

Everything about that wheel stands here. It has `tritonserver` 2.51, the Python backend and no other, one stub of that
backend per Python version, and the libraries of all of them; it needs no CUDA device. Only files of the wheel are used
and none of its Python code, so its dependencies (numpy below 2 among them) do not matter and are not installed.

    server and backend    find their libraries in `nvidia_pytriton.libs`, by LD_LIBRARY_PATH because the backend
                          directory is put together from links
    stub                  embeds this interpreter: it needs its libpython on LD_LIBRARY_PATH, and finds this virtual
                          environment, hence numpy and onnxruntime, through the first `python3` on PATH

Run as a program it serves a bundle while a command runs, which finds the server's address in place of GRPC_URL:

    python -m tests.triton_server model_repository/vmoe-fashion-mnist \
        python -m server --backend triton --triton-urls GRPC_URL
"""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from exporter.bundle import Bundle
from exporter.triton_config import TritonOptions
from exporter.triton_directory import write_model_directory
from tests.benchmarks.process_tree import members

# Below Linux's ephemeral ports (32768 and up). A client that keeps connecting to an ephemeral port while the server is
# down may be given that very port for its own end; it then talks to itself, and the restarted server cannot bind.
_PORTS = range(20000, 32000)
# Start and warm-up of the shipped model take 3 s on two busy cores; chosen with room for a loaded machine.
_START_TIMEOUT_S = 120.0
# Ends with exec, so that the server has the process id of the first of them.
_OWN_SHARED_MEMORY = (
    *("unshare", "--mount", "--map-root-user"),
    *("sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "sh"),
)
_STOP_TIMEOUT_S = 20.0  # Triton looks once a second whether models are unloaded; a stop takes 1 to 3 s


class TritonServerError(RuntimeError):
    """The server did not do what it should; the message has its log."""


class TritonServer:
    """One server process with its stubs, on this machine's loopback interface. Not thread-safe.

    Entering the context starts it and waits until it is ready; leaving stops it, whatever state it is in. `kill` and
    `start` in between give the same ports back, `pause` makes it hang.

    Arguments:
        repository: model repository; models for the backend `python` only.
        http_port, grpc_port, metrics_port: 0 takes a free one, which it keeps.
        arguments: more of the server's command line, after `--model-control-mode=none` and so able to change that.
        elsewhere: with a /dev/shm of its own, as on another machine. Needs leave to make a user namespace.
        echo: print the log to stderr, too.
    """

    def __init__(
        self,
        repository: Path,
        *,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        arguments: Sequence[str] = (),
        elsewhere: bool = False,
        echo: bool = False,
    ) -> None:
        self.repository, self.echo = repository, echo
        self._before = _OWN_SHARED_MEMORY if elsewhere else ()
        self.http_port, self.grpc_port, self.metrics_port = (
            port or free_port() for port in (http_port, grpc_port, metrics_port)
        )
        self._arguments = tuple(arguments)
        self._directory = tempfile.TemporaryDirectory(prefix="triton-server-")
        # Names the shared memory between server and stubs, which a killed server leaves behind.
        self._shared_memory = f"vmoe_triton_{uuid.uuid4().hex[:12]}_"
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._lines: list[str] = []
        self._changed = threading.Condition()

    @property
    def http_url(self) -> str:
        """As tritonclient.http takes it."""
        return f"127.0.0.1:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """As tritonclient.grpc takes it."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.metrics_port}/metrics"

    @property
    def log(self) -> str:
        """Everything that the server has printed since its last start."""
        with self._changed:
            return "".join(self._lines)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def stubs(self) -> list[int]:
        """Process ids of the Python backend's processes, one for each instance."""
        assert self._process is not None, "not started"
        return [
            pid
            for pid in members(self._process.pid)
            if Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].endswith(b"triton_python_backend_stub")
        ]

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Starts the process; `wait_ready` says when it serves. The ports are those of the last time."""
        assert not self.running, "already running"
        self._lines = []
        command = [
            *self._before,
            str(_package("pytriton") / "tritonserver/bin/tritonserver"),
            f"--model-repository={self.repository}",
            f"--backend-directory={self._backend_directory()}",
            f"--backend-config=python,shm-region-prefix-name={self._shared_memory}",
            "--model-control-mode=none",
            "--disable-auto-complete-config",
            *(f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")),
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}",
            *self._arguments,
        ]
        self._process = subprocess.Popen(
            command,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # server and stubs form a process group of their own, to be signalled as one
        )
        self._reader = threading.Thread(target=self._read, args=(self._process,), name="triton-log", daemon=True)
        self._reader.start()

    def wait_ready(self, timeout_s: float = _START_TIMEOUT_S) -> None:
        """Returns when every endpoint answers and all models are loaded and warm.

        Raises:
            TritonServerError: the server ended instead, or was not ready in time.
        """
        # The metrics endpoint is the last to start. Without model control, loading comes before the first endpoint.
        self.wait_for_log("Started Metrics Service at", timeout_s)
        with urllib.request.urlopen(f"http://{self.http_url}/v2/health/ready", timeout=timeout_s) as response:
            if response.status != 200:
                raise TritonServerError(f"started, but /v2/health/ready is {response.status}; its log:\n{self.log}")

    def wait_for_log(self, text: str, timeout_s: float = _START_TIMEOUT_S) -> None:
        """Returns when the log has a text.

        Raises:
            TritonServerError: the server ended without, or the time is over.
        """
        assert self._reader is not None, "not started"
        reader = self._reader
        with self._changed:
            seen = self._changed.wait_for(
                lambda: any(text in line for line in self._lines) or not reader.is_alive(), timeout_s
            )
            found = any(text in line for line in self._lines)
        if not found:
            state = "ended" if seen else f"is still running after {timeout_s:g} s"
            raise TritonServerError(f"tritonserver {state} without {text!r} in its log:\n{self.log}")

    def kill(self) -> None:
        """SIGKILL to server and stubs, as when the machine fails: no connection is closed in an orderly way."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._reap()

    def stop(self) -> None:
        """SIGTERM: the server finishes what it has begun and unloads; it is killed when that takes too long."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
        self._reap()

    def pause(self) -> None:
        """SIGSTOP: it hangs. The kernel goes on accepting connections for it.

        The stubs run on. Had they been stopped, too, the Python backend of 2.51 would take one for dead when all go on,
        and in one of five cases crash over it.
        """
        assert self._process is not None, "not started"
        self._process.send_signal(signal.SIGSTOP)
        # Its threads stop one after the other. WNOWAIT leaves an end of the process for Popen to see.
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Ends `pause`."""
        assert self._process is not None, "not started"
        self._process.send_signal(signal.SIGCONT)

    def restart(self) -> None:
        """Kills it, starts it again on the same ports, and waits until it is ready."""
        self.kill()
        self.start()
        self.wait_ready()

    def close(self) -> None:
        """Ends the server and removes what it leaves behind. Safe to call in any state, and twice."""
        if self.running:
            self.resume()  # a paused process would not see SIGTERM
        self.stop()
        self._directory.cleanup()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "not started"
        with contextlib.suppress(ProcessLookupError):  # it had ended
            os.killpg(self._process.pid, number)

    def _reap(self) -> None:
        assert self._process is not None
        assert self._reader is not None
        self._process.wait()
        self._signal(signal.SIGKILL)  # stubs that outlived a crashed server
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None
        for left in Path("/dev/shm").glob(f"*{self._shared_memory}*"):
            left.unlink(missing_ok=True)

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if self.echo:
                sys.stderr.write(line)
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def _backend_directory(self) -> Path:
        """The Python backend with the stub of this Python version, where the server expects it."""
        wheel = _package("pytriton") / "tritonserver"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = wheel / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.exists():
            known = sorted(path.name for path in stub.parent.parent.iterdir())
            raise TritonServerError(f"nvidia-pytriton has no stub for Python {version}, only for {', '.join(known)}")
        directory = Path(self._directory.name) / "backends"
        python = directory / "python"
        if not python.exists():
            python.mkdir(parents=True)
            for path in (wheel / "backends/python").iterdir():
                (python / path.name).symlink_to(path)
            (python / stub.name).symlink_to(stub)
        return directory


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    for port in random.sample(_PORTS, 100):  # not seeded: parallel runs must differ
        with socket.socket() as candidate:
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise TritonServerError(f"no free port between {_PORTS.start} and {_PORTS.stop}")


def python_repository(bundle: Path, repository: Path, options: TritonOptions | None = None) -> Path:
    """Writes a bundle's model into `repository` for this server, which has the Python backend only.

    Arguments:
        options: with backend `python`; default: one instance with one thread.
    """
    loaded = Bundle.load(bundle)
    options = options or TritonOptions(backend="python", threads=1)
    write_model_directory(loaded, repository / loaded.manifest.name, options)
    return repository


def _package(name: str) -> Path:
    """Directory of an installed package, found without running its code."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise TritonServerError("nvidia-pytriton is not installed; `make test` does that without its dependencies")
    return Path(next(iter(spec.submodule_search_locations)))


def _environment() -> dict[str, str]:
    libraries = [_package("pytriton").parent / "nvidia_pytriton.libs"]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    directory = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    if (directory / f"libpython{version}.so.1.0").exists():
        libraries.append(directory)
    elif ctypes.util.find_library(f"python{version}") is None:
        raise TritonServerError(
            f"Triton's Python backend needs libpython{version}.so.1.0, and neither {directory} nor the system has it; "
            f"Debian's package is libpython{version}, pyenv builds it with --enable-shared"
        )
    environment = dict(os.environ)
    # Not resolved: the link in the virtual environment is what tells the stub where that is.
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', os.defpath)}"
    path = ":".join(map(str, libraries))
    inherited = environment.get("LD_LIBRARY_PATH")
    environment["LD_LIBRARY_PATH"] = path if inherited is None else f"{path}:{inherited}"
    return environment


def main(bundle: str, *command: str) -> int:
    """Serves a bundle on free ports, with all cores, while a command runs; returns the command's exit code."""
    with tempfile.TemporaryDirectory(prefix="triton-repository-") as directory:
        repository = python_repository(Path(bundle), Path(directory), TritonOptions(backend="python"))
        with TritonServer(repository, echo=True) as server:
            print(f"Triton serves gRPC on {server.grpc_url}, HTTP on {server.http_url}", file=sys.stderr, flush=True)
            process = subprocess.Popen([word.replace("GRPC_URL", server.grpc_url) for word in command])
            previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
            try:
                while True:
                    # Ctrl-C reaches the command as well, which may want to drain: Triton stays until it has ended.
                    with contextlib.suppress(KeyboardInterrupt):
                        return process.wait()
            finally:
                signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
