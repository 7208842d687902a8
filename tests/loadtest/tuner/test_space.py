"""The space follows the models: whatever it proposes is valid, and the defaults are in it."""

from __future__ import annotations

import optuna
import pytest
from pydantic import BaseModel, Field

from loadtest.subject import Subject
from loadtest.tuner.space import bounds, candidate, defaults, suggest
from server.policy_file import POLICY_NAMES, PolicyConfig, PolicyName, default_policy, parameters_of, parse_policy

BUDGETS = '[budgets.auto]\ndeadline_ms = 80.0\n[budgets.edge]\nceiling = "0.5,1"\nweight = 0.5\n'


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_space_when_a_policy_has_its_defaults_then_its_configuration_is_that_of_the_name(
    name: PolicyName, subject: Subject
) -> None:
    document = suggest(optuna.trial.FixedTrial(defaults(name)), POLICY_NAMES)  # type: ignore[arg-type]
    found = candidate(document, PolicyConfig(), subject, "here")
    assert found.config == default_policy(subject.manifest, subject.ladder, name).config


@pytest.mark.parametrize("name", [name for name in POLICY_NAMES if parameters_of(name) is not None])
def test_space_when_a_parameter_is_at_an_end_then_the_model_accepts_it_and_the_default_lies_between(
    name: PolicyName,
) -> None:
    model = parameters_of(name)
    assert model is not None
    for key, field in model.model_fields.items():
        low, high, _ = bounds(field)
        assert low <= field.default <= high
        for end in (low, high):
            model.model_validate({key: round(end) if field.annotation is int else end})


def test_bounds_when_worked_out_by_hand_then_they_are_these() -> None:
    class Model(BaseModel):
        share: float = Field(default=0.5, gt=0, le=1)
        factor: float = Field(default=0.5, ge=0, lt=1)
        period_s: float = Field(default=10.0, gt=0)

    found = {name: bounds(field) for name, field in Model.model_fields.items()}
    # 1 % of the distance from an excluded end; an eighth of the default to eight times it.
    assert found == {"share": (0.01, 1, False), "factor": (0, 0.99, False), "period_s": (1.25, 80, True)}


def test_space_when_many_are_drawn_then_each_is_valid_keeps_the_budgets_and_reads_back_the_same(
    subject: Subject,
) -> None:
    base = parse_policy(BUDGETS, subject.manifest, subject.ladder, "base")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    names = set()
    for number in range(60):
        trial = study.ask()
        found = candidate(suggest(trial, POLICY_NAMES), base.config, subject, f"trial {number}")
        assert found.budgets == base.budgets
        assert parse_policy(found.text, subject.manifest, subject.ladder, "again").config == found.config
        names.add(found.config.policy)
        study.tell(trial, 0.0)
    assert names == set(POLICY_NAMES)
