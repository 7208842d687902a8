from __future__ import annotations

from pathlib import Path

import pytest

from exporter.bundle import Bundle, Manifest
from server.ladder import Ladder
from server.policy_file import PolicyError
from server.policy_source import PolicySource


def source(setting: str, directory: Path, manifest: Manifest, max_deadline_s: float = 10) -> PolicySource:
    return PolicySource(setting, Bundle(directory, manifest), Ladder.of(manifest), max_deadline_s)


def test_source_when_the_bundle_has_a_file_then_it_is_used(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "policy.toml").write_text('policy = "aimd"')
    active = source("", tmp_path, manifest).load()
    assert (active.config.policy, active.source) == ("aimd", str(tmp_path / "policy.toml"))


def test_source_when_the_bundle_has_no_file_then_foresight_until_one_appears(
    tmp_path: Path, manifest: Manifest
) -> None:
    found = source("", tmp_path, manifest)
    assert found.load().config.policy == "foresight"
    (tmp_path / "policy.toml").write_text('policy = "aimd"')
    assert found.reload().config.policy == "aimd"


def test_source_when_a_policy_is_named_then_the_bundles_file_is_ignored_and_nothing_reloads(
    tmp_path: Path, manifest: Manifest
) -> None:
    (tmp_path / "policy.toml").write_text('policy = "aimd"')
    found = source("fixed", tmp_path, manifest)
    assert found.load().config.policy == "fixed"
    with pytest.raises(PolicyError, match="the name 'fixed', so there is no file to read again"):
        found.reload()


MINE, OTHER = "a" * 64, "b" * 64


def tuned(manifest_sha256: str) -> str:
    return f'policy = "aimd"\n[provenance]\nmanifest_sha256 = "{manifest_sha256}"\nseed = 3\n'


def test_source_when_the_policy_was_tuned_for_this_manifest_then_it_is_used(tmp_path: Path, manifest: Manifest) -> None:
    bundle = Bundle(tmp_path, manifest, MINE)
    (tmp_path / "policy.toml").write_text(tuned(MINE))
    active = PolicySource("", bundle, Ladder.of(manifest), 10).load()
    assert active.config.provenance is not None
    assert active.config.provenance.seed == 3


def test_source_when_the_policy_was_tuned_for_another_manifest_then_both_are_named_unless_it_is_forced(
    tmp_path: Path, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = Bundle(tmp_path, manifest, MINE)
    (tmp_path / "policy.toml").write_text(tuned(OTHER))
    found = PolicySource("", bundle, Ladder.of(manifest), 10)
    for read in (found.load, found.reload, lambda: found.parse(tuned(OTHER))):
        with pytest.raises(PolicyError, match=f"{OTHER}, that of the bundle is {MINE}: .* --force-policy"):
            read()
    forced = PolicySource("", bundle, Ladder.of(manifest), 10, force=True)
    assert forced.load().config.policy == "aimd"
    assert "used all the same" in caplog.text


def test_source_when_a_hash_is_none_then_the_line_is_named(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "policy.toml").write_text(tuned("12"))
    with pytest.raises(PolicyError, match=r"line 3: provenance\.manifest_sha256: String should match pattern"):
        source("", tmp_path, manifest).load()


def test_source_when_neither_name_nor_file_then_the_names_are_listed(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(PolicyError, match="fxed' is neither a file nor a policy; policies are foresight, fixed"):
        source(str(tmp_path / "fxed"), tmp_path, manifest).load()


def test_source_when_a_deadline_exceeds_the_request_timeout_then_it_ends_with_it(
    tmp_path: Path, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine.toml").write_text("[budgets.batch]\ndeadline_ms = 60000")
    active = source(str(tmp_path / "mine.toml"), tmp_path, manifest, max_deadline_s=5).load()
    assert (active.budgets["batch"].deadline_s, active.budgets["auto"].deadline_s) == (5, 1)
    assert "deadlines of the budgets batch are cut to the request timeout of 5 s" in caplog.text


@pytest.mark.parametrize("name", ["custom", "invalid"])
def test_source_when_a_budget_takes_a_label_of_the_metrics_then_it_is_refused_with_its_line(
    tmp_path: Path, manifest: Manifest, name: str
) -> None:
    (tmp_path / "policy.toml").write_text(f'policy = "fixed"\n[budgets.{name}]\nweight = 2')
    with pytest.raises(PolicyError, match=f"line 2: budget name '{name}' is reserved"):
        source("", tmp_path, manifest).load()


def test_source_when_the_policy_is_a_directory_then_the_message_says_what_to_name(
    tmp_path: Path, manifest: Manifest
) -> None:
    with pytest.raises(PolicyError, match=r"is a directory; name a policy\.toml"):
        source(str(tmp_path), tmp_path, manifest).load()


def test_source_when_several_bundles_make_the_ladder_then_a_policy_tuned_for_one_does_not_fit(
    tmp_path: Path, manifest: Manifest
) -> None:
    (tmp_path / "policy.toml").write_text(tuned(MINE))
    ladder = Ladder.of(manifest, ["", "int8", "", "int8"])
    with pytest.raises(
        PolicyError, match="several bundles, which a policy tuned for one does not fit: leave --also out"
    ):
        PolicySource("", Bundle(tmp_path, manifest), ladder, 10).load()
    assert PolicySource("", Bundle(tmp_path, manifest), ladder, 10, force=True).load().config.policy == "aimd"


def test_source_when_a_posted_deadline_would_be_cut_then_it_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(
        PolicyError, match="deadline_ms of budget 'batch' must be at most 5000, the request timeout, got 60000"
    ):
        source("", tmp_path, manifest, max_deadline_s=5).parse("[budgets.batch]\ndeadline_ms = 60000")
