"""One point per budget, whatever the load: every request at its ceiling, as many as fit into a batch."""

from __future__ import annotations

from server.policies.base import Proposal, Stateless, View


class Fixed(Stateless):
    """No degradation: what cannot be served in time at its ceiling is shed."""

    name = "fixed"
    degrades = False

    def decide(self, view: View) -> Proposal:
        return Proposal([kind.ceiling for kind in view.kinds[: view.max_batch_size]])
