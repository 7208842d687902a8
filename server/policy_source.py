"""Where the policy in force comes from, at start and on reload. The setting `policy` is one of

empty     `policy.toml` in the bundle's directory; where there is none, foresight with default budgets
a name    that policy with default budgets; there is no file, so nothing can be reloaded
a path    this policy.toml

A policy may also be handed over as text; it is checked in the same way. One whose `[provenance]` names another manifest
is refused, unless forced.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Final

from exporter.bundle import Bundle
from server.ladder import Ladder
from server.policy_file import (
    POLICY_FILE,
    POLICY_NAMES,
    ActivePolicy,
    PolicyError,
    default_policy,
    load_policy,
    parse_policy,
)

logger = logging.getLogger(__name__)

POSTED: Final = "POST /v1/admin/policy"  # source of a policy that came as text


class PolicySource:
    """Reads the policy of one bundle.

    Arguments:
        setting: as above.
        max_deadline_s: the request timeout; deadlines of budgets end with it.
        force: accept a policy that was tuned for another manifest.
    """

    def __init__(
        self, setting: str, bundle: Bundle, ladder: Ladder, max_deadline_s: float, *, force: bool = False
    ) -> None:
        self._name = next((name for name in POLICY_NAMES if name == setting), None)
        self._path = Path(setting) if setting else bundle.directory / POLICY_FILE
        self._optional = not setting
        self._manifest, self._manifest_sha256 = bundle.manifest, bundle.manifest_sha256
        self._ladder, self._max_deadline_s, self._force = ladder, max_deadline_s, force

    def load(self) -> ActivePolicy:
        """Reads it. Blocks on the file system.

        Raises:
            PolicyError: the file cannot be used; the message names it, and its line.
        """
        if self._name is not None:
            return self._bounded(default_policy(self._manifest, self._ladder, self._name))
        if self._path.is_dir():
            raise PolicyError(f"policy {str(self._path)!r} is a directory; name a {POLICY_FILE}, such as one in it")
        if not self._path.exists():
            if self._optional:
                return self._bounded(default_policy(self._manifest, self._ladder))
            raise PolicyError(
                f"policy {str(self._path)!r} is neither a file nor a policy; policies are {', '.join(POLICY_NAMES)}"
            )
        return self._bounded(self._matching(load_policy(self._path, self._manifest, self._ladder)))

    def parse(self, text: str, source: str = POSTED) -> ActivePolicy:
        """As `load`, from the text of a policy.toml.

        Raises:
            PolicyError: as for `load`; or it was posted, and asks for deadlines that would be cut.
        """
        active = parse_policy(text, self._manifest, self._ladder, source)
        longest_ms = 1000 * self._max_deadline_s
        for name, table in active.config.budgets.items():
            if source == POSTED and table.deadline_ms is not None and table.deadline_ms > longest_ms:
                raise PolicyError(
                    f"{source}: deadline_ms of budget {name!r} must be at most {longest_ms:g}, the request timeout, "
                    f"got {table.deadline_ms:g}"
                )
        return self._bounded(self._matching(active))

    def reload(self) -> ActivePolicy:
        """As `load`, for a policy that may have changed since.

        Raises:
            PolicyError: as for `load`; or the setting is a name.
        """
        if self._name is not None:
            raise PolicyError(
                f"the setting policy is the name {self._name!r}, so there is no file to read again; "
                "start with the path of a policy.toml to reload it"
            )
        return self.load()

    def _matching(self, active: ActivePolicy) -> ActivePolicy:
        tuned = active.config.provenance
        if tuned is None or tuned.manifest_sha256 == self._manifest_sha256:
            return active
        what = f"{active.source} was tuned for the manifest with SHA-256 {tuned.manifest_sha256}, "
        if any(rung.model for rung in self._ladder.rungs):
            what += "and the ladder is one of several bundles, which a policy tuned for one does not fit"
            remedy = "leave --also out, name another --policy, or use it all the same with --force-policy"
        else:
            what += f"that of the bundle is {self._manifest_sha256 or 'unknown'}"
            remedy = "tune it again, or start with --force-policy"
        if not self._force:
            raise PolicyError(f"{what}: {remedy}")
        logger.warning("%s; it is used all the same: force_policy is set", what)
        return active

    def _bounded(self, active: ActivePolicy) -> ActivePolicy:
        longer = [name for name, budget in active.budgets.items() if budget.deadline_s > self._max_deadline_s]
        if longer:
            logger.warning(
                "deadlines of the budgets %s are cut to the request timeout of %g s",
                ", ".join(longer),
                self._max_deadline_s,
            )
        return replace(
            active,
            budgets={
                name: replace(budget, deadline_s=min(budget.deadline_s, self._max_deadline_s))
                for name, budget in active.budgets.items()
            },
        )
