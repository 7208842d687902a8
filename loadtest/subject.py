"""What is under test: a bundle with its profile, and the policy that decides for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exporter.bundle import Bundle, BundleError, Manifest
from loadtest.errors import LoadtestError, UnsuitableBundle
from server.ladder import Ladder
from server.latency import LatencyModel
from server.policy_file import POLICY_FILE, POLICY_NAMES, ActivePolicy, PolicyError, default_policy, load_policy
from server.scheduler import Limits, Scheduler


@dataclass(frozen=True)
class Subject:
    """A bundle that can be simulated.

    Attributes:
        manifest_sha256: a policy or a report that names another one belongs to another model.
    """

    directory: Path
    manifest: Manifest
    manifest_sha256: str
    ladder: Ladder

    @classmethod
    def load(cls, directory: Path) -> Subject:
        """Raises `UnsuitableBundle` where there is no bundle, or one without a latency profile."""
        try:
            bundle = Bundle.load(directory)
        except BundleError as error:
            raise UnsuitableBundle(str(error)) from error
        subject = cls(directory, bundle.manifest, bundle.manifest_sha256, Ladder.of(bundle.manifest))
        subject.latency()
        return subject

    def latency(self, max_batch_size: int | None = None, quantile: float = 0.9) -> LatencyModel:
        """A new latency model that starts from the profile.

        Raises:
            UnsuitableBundle: there is no profile, or batches of this size cannot be run.
        """
        largest = self.manifest.max_batch_size
        size = largest if max_batch_size is None else max_batch_size
        if not 1 <= size <= largest:
            raise UnsuitableBundle(f"max_batch_size must be from 1 to {largest}, the bundle's, got {size}")
        model = LatencyModel.of(self.manifest.points, size, quantile)
        if model is None:
            measure = f"python -m exporter --profile-only --name {self.directory.name} --out {self.directory.parent}"
            what = "a dense model, which has no operating points to choose from"
            raise UnsuitableBundle(
                f"{self.directory} is {what}"
                if not self.manifest.points
                else f"{self.directory} has no latency profile; measure it on the machine that serves: {measure}"
            )
        return model

    def policy(self, name_or_file: str | None) -> ActivePolicy:
        """By name with its defaults, or from a policy.toml; the bundle's own file, if it has one, for None.

        Raises:
            LoadtestError: there is no such policy or file, or the file is bad.
        """
        own = self.directory / POLICY_FILE
        if name_or_file is None:
            return self._read(own) if own.is_file() else default_policy(self.manifest, self.ladder)
        for name in POLICY_NAMES:
            if name == name_or_file:
                return default_policy(self.manifest, self.ladder, name)
        path = Path(name_or_file)
        if not path.is_file():
            known = ", ".join(POLICY_NAMES)
            raise LoadtestError(f"policy must be one of {known}, or a TOML file that exists, got {name_or_file!r}")
        return self._read(path)

    def scheduler(self, active: ActivePolicy, *, max_batch_size: int | None = None, workers: int = 1) -> Scheduler:
        """A fresh one, as the gateway makes it."""
        if workers < 1:
            raise LoadtestError(f"workers must be at least 1, got {workers}")
        latency = self.latency(max_batch_size, active.config.quantile)
        limits = Limits(latency.max_batch_size, workers)
        return Scheduler(self.ladder, latency, active.build(), limits, horizon_s=active.horizon_s)

    def _read(self, path: Path) -> ActivePolicy:
        try:
            return load_policy(path, self.manifest, self.ladder)
        except PolicyError as error:
            raise LoadtestError(str(error)) from error
