"""Published tables against our predictions: the scenario files that come with the package.

Each file in `profiles/published` is a run whose seconds somebody published, and says how every
input is known. The profiles they name come with the package, too, so a row does not change with
what a user has measured.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from offload_rt.costs.step import Prediction
from offload_rt.errors import ConfigError
from offload_rt.planning.scenarios.scenario import Found, Scenario, load_scenario
from offload_rt.planning.scenarios.simulate import simulate
from offload_rt.profiling.profile import HardwareProfile, Obtained
from offload_rt.profiling.store import load_profile, shipped_folders

TOLERANCE = 0.15  # of the published time


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A published time and ours.

    Attributes:
        per: what it is the time of: `token` or `pass`.
        found_s: published.
        predicted_s: ours.
        assumed: keys of the scenario that nobody published.
    """

    scenario: Scenario
    prediction: Prediction
    per: str
    found_s: float
    predicted_s: float
    assumed: tuple[str, ...]

    @property
    def error(self) -> float:
        """Ours over the published one, less 1."""
        return self.predicted_s / self.found_s - 1.0

    @property
    def hit(self) -> bool:
        """Whether it is within the tolerance."""
        return abs(self.error) <= TOLERANCE


def published_folder() -> Path:
    """Where the files are.

    Raises:
        ConfigError: the package was installed without them.
    """
    for folder in shipped_folders():
        if (folder / "published").is_dir():
            return folder / "published"
    raise ConfigError(
        "the published scenarios (profiles/published) are not installed: reinstall offload-rt"
    )


def compare_published(folder: Path | None = None) -> list[Comparison]:
    """Predict every published run, by the names of their files.

    Args:
        folder: of the scenario files; None: those of the package. Their profiles are next to it.

    Raises:
        ConfigError: a file is no usable scenario, or has nothing to compare with.
    """
    folder = folder or published_folder()
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ConfigError(f"{folder} has no scenario files: give a folder with *.json")
    profile_of = cache(lambda name: load_profile(folder.parent / f"{name}.json"))
    compared = []
    for path in paths:
        scenario = load_scenario(path)
        if scenario.found is None:
            raise ConfigError(f"{path} has no `found`: add what was measured, with its source")
        compared.append(compare(scenario, scenario.found, profile_of(scenario.profile)))
    return compared


def compare(scenario: Scenario, found: Found, profile: HardwareProfile) -> Comparison:
    """Predict one run and set it beside what was found.

    Raises:
        ConfigError: `found` has no time, or two.
    """
    if (found.s_per_token is None) == (found.s_per_pass is None):
        raise ConfigError(f"found of {scenario.name} needs one of s_per_token and s_per_pass")
    prediction = simulate(scenario, profile)
    per = "pass" if found.s_per_token is None else "token"
    predicted_s = prediction.step_s if per == "pass" else prediction.s_per_token
    return Comparison(
        scenario=scenario,
        prediction=prediction,
        per=per,
        found_s=found.s_per_token or found.s_per_pass or 0.0,
        predicted_s=predicted_s,
        assumed=tuple(
            key
            for entry in scenario.inputs
            if entry.obtained is Obtained.ASSUMED
            for key in entry.keys
        ),
    )
