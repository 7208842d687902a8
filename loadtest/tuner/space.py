"""What may be searched: policy, parameters and quantile, as their models in `server.policy_file` declare them.

    bounded on both sides    evenly between the bounds, an excluded one moved in by 1 % of their distance
    unbounded above          evenly in the logarithm, from the default / 8 to the default * 8

(8 is chosen, not tuned: wide enough for a policy to change its character.) What is added there is searched without a
line here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

import annotated_types
import tomli_w
from optuna.trial import Trial
from pydantic.fields import FieldInfo

from loadtest.subject import Subject
from server.policy_file import ActivePolicy, PolicyConfig, PolicyName, parameters_of, parse_policy

POLICY: Final = "policy"
QUANTILE: Final = "quantile"
_WIDTH: Final = 8.0
_MARGIN: Final = 0.01
_Bounds = tuple[float, float, bool]  # lowest, highest, evenly in the logarithm


def suggest(trial: Trial, names: Sequence[PolicyName]) -> dict[str, Any]:
    """The search's next document, without budgets."""
    name = cast(PolicyName, trial.suggest_categorical(POLICY, list(names)))
    document: dict[str, Any] = {POLICY: name, QUANTILE: _draw(trial, QUANTILE, PolicyConfig.model_fields[QUANTILE])}
    if (model := parameters_of(name)) is not None:
        document[name] = {key: _draw(trial, f"{name}.{key}", field) for key, field in model.model_fields.items()}
    return document


def defaults(name: PolicyName) -> dict[str, Any]:
    """What makes `suggest` propose a policy with its default parameters."""
    model = parameters_of(name)
    parameters = {} if model is None else {f"{name}.{key}": field.default for key, field in model.model_fields.items()}
    return {POLICY: name, QUANTILE: PolicyConfig.model_fields[QUANTILE].default, **parameters}


def candidate(document: dict[str, Any], base: PolicyConfig, subject: Subject, source: str) -> ActivePolicy:
    """A document with the budgets of `base`. It goes through its text, so that what is simulated is what is written."""
    budgets = base.model_dump(include={"budgets"}, exclude_none=True)
    text = tomli_w.dumps(document | (budgets if budgets["budgets"] else {}))
    return parse_policy(text, subject.manifest, subject.ladder, source)


def bounds(field: FieldInfo) -> _Bounds:
    """Of a parameter."""
    low: Any = None
    high: Any = None
    excluded = [False, False]
    for limit in field.metadata:
        match limit:
            case annotated_types.Ge(ge):
                low = ge
            case annotated_types.Gt(gt):
                low, excluded[0] = gt, True
            case annotated_types.Le(le):
                high = le
            case annotated_types.Lt(lt):
                high, excluded[1] = lt, True
    if low is None or high is None:
        assert field.default > 0, "a parameter without an upper bound needs a default above 0 to start from"
        return field.default / _WIDTH, field.default * _WIDTH, True
    margin = _MARGIN * (high - low)
    return low + margin * excluded[0], high - margin * excluded[1], False


def _draw(trial: Trial, name: str, field: FieldInfo) -> float:
    low, high, log = bounds(field)
    if field.annotation is int:
        return trial.suggest_int(name, max(1, round(low)) if log else round(low), round(high), log=log)
    # Three digits: nobody can tell more of them apart, and people read the file.
    return min(max(float(f"{trial.suggest_float(name, low, high, log=log):.3g}"), low), high)
