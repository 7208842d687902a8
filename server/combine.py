"""Several bundles of one model, such as float32 and int8, as one manifest whose points form one ladder.

The bundle that is served by name has the full point. The points of the others join where they cost less time:

    cost(p) = mean over batch sizes n of  median latency(p, n) / median latency(full, n)

takes the place of relative compute, which says nothing across bundles. A point is dominated where another one, of
whichever bundle, is at least as accurate at no more cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from exporter.bundle import Bundle, BundleError, Manifest, Point, dominates


@dataclass(frozen=True)
class Combined:
    """Attributes:
    bundle: with the points of all.
    models: for each point the bundle that it belongs to; "" for the one that is served by name.
    """

    bundle: Bundle
    models: tuple[str, ...]


def combine(served: Bundle, others: Sequence[Bundle]) -> Combined:
    """One bundle of several.

    Raises:
        BundleError: they are not of one model, or were not measured alike.
    """
    if not others:
        return Combined(served, ("",) * len(served.manifest.points))
    _check(served, served)
    for other in others:
        _check(served, other)
    full = served.manifest.points[-1]
    priced = [("", point, _cost(point, full)) for point in served.manifest.points[:-1]]
    for other in others:
        every = [(other.manifest.name, point, _cost(point, full)) for point in other.manifest.points]
        priced += [entry for entry in every if entry[2] < 1]
    priced = [*sorted(priced, key=lambda entry: entry[2]), ("", full, 1.0)]
    points = [point.model_copy(update={"relative_compute": min(cost, 1.0)}) for _, point, cost in priced]
    update = {
        "points": tuple(
            point.model_copy(update={"dominated": point is not points[-1] and any(dominates(q, point) for q in points)})
            for point in points
        ),
        "max_batch_size": min(each.manifest.max_batch_size for each in (served, *others)),
    }
    # The hash of neither: a policy that was tuned for one of them was tuned for another ladder.
    bundle = Bundle(served.directory, served.manifest.model_copy(update=update), "")
    return Combined(bundle, tuple(model for model, _, _ in priced))


def _cost(point: Point, full: Point) -> float:
    return fmean(mine.median_s / its.median_s for mine, its in zip(point.latency, full.latency, strict=True))


def _check(served: Bundle, other: Bundle) -> None:
    ours, theirs = served.manifest, other.manifest
    for name in ("architecture", "preprocessing", "labels", "max_selected_experts"):
        if getattr(ours, name) != getattr(theirs, name):
            raise BundleError(f"{other.directory} has another {name} than {served.directory}: not the same model")
    if other is not served and ours.name == theirs.name:
        raise BundleError(f"{other.directory} and {served.directory} have the same name, {ours.name}")
    if _measured_on(ours) != _measured_on(theirs):
        raise BundleError(
            f"{other.directory} was profiled on {_measured_on(theirs)}, {served.directory} on {_measured_on(ours)}: "
            "their times cannot be compared; run python -m exporter --profile-only --profile-with on this machine"
        )
    sizes = [[entry.batch_size for entry in point.latency] for point in (*ours.points, *theirs.points)]
    if not sizes or not sizes[0] or any(each != sizes[0] for each in sizes):
        raise BundleError(
            f"{other.directory} and {served.directory} need latencies of the same batch sizes at all points: export "
            "both with the same --rounds, above 0"
        )
    if any(point.accuracy is None for point in theirs.points):
        raise BundleError(f"{other.directory} was exported without accuracies; export it with --images")


def _measured_on(manifest: Manifest) -> str:
    profile = manifest.profile
    return "no machine" if profile is None else f"{profile.machine} with {profile.threads} threads"
