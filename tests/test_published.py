"""Published tables: which rows our predictions hit, and that wrong constants miss."""

import json
from dataclasses import replace

import pytest
from test_profile import PROJECT

from offload_rt.errors import ConfigError
from offload_rt.planning.scenarios.published import TOLERANCE, compare, compare_published
from offload_rt.planning.scenarios.scenario import given_keys
from offload_rt.profiling.adjust import adjust_profile
from offload_rt.profiling.profile import Obtained
from offload_rt.profiling.store import load_profile

ROWS = {c.scenario.name: c for c in compare_published(PROJECT / "profiles" / "published")}

# Both rest on an input that nobody published: how many layers stayed on the device, and how many
# tokens a pass emits with a tree of another system.
MISSES = {"sequoia-4090-llama2-13b-plain", "umbrella-4090-llama31-70b-awq-greedy"}
# Of mixtures nobody publishes how much of a run is the host's, nor most hit rates.
MIXTURES = {
    "flashmoe-4090-qwen35-397b": False,
    "freetoken-4090-flash-next": True,
    "freetoken-5090-flash-next": False,
    "freetoken-5090-qwen36-35b": False,
    "llamacpp-4090-gpt-oss-120b": True,
    "llamacpp-cache-5090-flash-next": False,
}


def test_the_rows_that_hit_still_hit_and_the_misses_are_known():
    missed = {name for name, row in ROWS.items() if not row.hit and name not in MIXTURES}
    assert missed == MISSES
    assert len(ROWS) == 27


def test_rows_of_mixtures_are_within_a_quarter_or_known_to_miss():
    found = {name: abs(row.error) <= 0.25 for name, row in ROWS.items() if name in MIXTURES}
    assert found == MIXTURES


def test_rows_whose_inputs_are_all_published_are_closer():
    """A floor for the model itself: nothing in these rows could have been chosen to fit."""
    sure = [row for row in ROWS.values() if not row.assumed]
    assert len(sure) >= 3
    assert max(abs(row.error) for row in sure) < 0.08


@pytest.mark.parametrize("name", sorted(ROWS))
def test_every_input_says_how_it_is_known(name):
    scenario = ROWS[name].scenario
    assert scenario.found is not None and scenario.found.source
    assert name == scenario.name
    known = {key for entry in scenario.inputs for key in entry.keys}
    assert all(entry.obtained is not Obtained.MEASURED for entry in scenario.inputs)
    for key in given_keys(scenario):
        if key.split(".")[0] in ("schema_version", "name", "found", "inputs"):
            continue
        parts = key.split(".")
        above = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        assert above & known, f"{key} has no entry in inputs"


@pytest.mark.parametrize(
    ("setting", "gpu", "least"),
    [
        ("h2d_bytes_per_s=13e9", "rtx4090-pcie4x16", 8),
        ("h2d_bytes_per_s=52e9", "rtx4090-pcie4x16", 8),
        ("attention[1].s_per_kv_byte=3e-12", "a100-80gb-pcie4x16", 1),
        ("layers[1].times[0].layer_s=0.003", "rtx4090-pcie4x16", 3),
    ],
)
def test_a_wrong_constant_misses(setting, gpu, least):
    wrong = adjust_profile(load_profile(PROJECT / "profiles" / f"{gpu}.json"), [setting])
    rows = [row for row in ROWS.values() if row.scenario.profile == gpu and row.hit]
    again = [compare(row.scenario, row.scenario.found, wrong) for row in rows]
    assert sum(not row.hit for row in again) >= least


def test_errors_are_signed_and_hits_are_within_the_tolerance():
    row = ROWS["sequoia-4090-llama2-70b"]
    slow = replace(row, predicted_s=row.found_s * (1 + TOLERANCE + 0.01))
    fast = replace(row, predicted_s=row.found_s * (1 - TOLERANCE + 0.01))
    assert slow.error > 0 > fast.error
    assert fast.hit and not slow.hit


def test_a_pass_is_compared_with_a_pass():
    row = ROWS["sequoia-4090-llama2-70b"]
    found = replace(row.scenario.found, s_per_token=None, s_per_pass=5.0)
    profile = load_profile(PROJECT / "profiles" / "rtx4090-pcie4x16.json")
    made = compare(row.scenario, found, profile)
    assert made.per == "pass" and made.predicted_s == made.prediction.step_s
    with pytest.raises(ConfigError, match="needs one of s_per_token and s_per_pass"):
        compare(row.scenario, replace(found, s_per_pass=None), profile)


def test_folders_without_scenarios_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no scenario files"):
        compare_published(tmp_path)
    text = (PROJECT / "profiles" / "published" / "sequoia-4090-llama2-70b.json").read_text()
    tree = json.loads(text)
    del tree["found"]
    (tmp_path / "a.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="has no `found`"):
        compare_published(tmp_path)
