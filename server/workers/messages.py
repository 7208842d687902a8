"""What supervisor and workers say to each other. A policy travels as text, since every worker serves the same bundle.

    worker -> supervisor    Warm, Failed    once, when it could serve; when it never will
                            Share           everybody use this policy, which I have checked
                            Applied         done
    supervisor -> worker    Go              admit requests
                            Reload          read the policy again, and share it
                            Apply           use this policy, and say so
                            Shared          what you shared is in force everywhere
                            Stop            drain

One that finds its end of the pipe closed by the other has lost it.
"""

from __future__ import annotations

from dataclasses import dataclass

from server.policy_file import PolicyText


@dataclass(frozen=True)
class Warm:
    """Attributes:
    policy: in force.
    """

    policy: PolicyText


@dataclass(frozen=True)
class Failed:
    """The warm-up; the worker's log has the reason."""


@dataclass(frozen=True)
class Share:
    """Attributes:
    key: the worker's own, for `Shared`.
    """

    key: int
    policy: PolicyText


@dataclass(frozen=True)
class Applied:
    """Attributes:
    number: of `Apply`.
    """

    number: int


@dataclass(frozen=True)
class Go:
    """Every worker of the start is warm."""


@dataclass(frozen=True)
class Reload:
    """SIGHUP; one worker gets it for all."""


@dataclass(frozen=True)
class Apply:
    """Attributes:
    number: counts up; all workers get the same order.
    """

    number: int
    policy: PolicyText


@dataclass(frozen=True)
class Shared:
    """Attributes:
    key: of `Share`.
    """

    key: int


@dataclass(frozen=True)
class Stop:
    """A message and no SIGTERM, of which a second one means more: some service managers send one to every process."""


FromWorker = Warm | Failed | Share | Applied
ToWorker = Go | Reload | Apply | Shared | Stop
