"""Models are found where people have them: linked from other disks, in caches of every shape."""

import os
import shutil
from types import SimpleNamespace

import pytest

from offload_rt.errors import CheckpointError
from offload_rt.model import files
from offload_rt.model.checkpoint import open_checkpoint, resolve_model
from offload_rt.model.locate import hub_id_of

COMMIT = "0123456789" * 4


def linked(folder, target, name="{name}"):
    """A folder of links to the files of another, which are moved to `name` there."""
    target.mkdir()
    for file in sorted(folder.iterdir()):
        place = file.rename(folder / name.format(name=file.name))
        (target / file.name).symlink_to(place)
    return target


@pytest.fixture
def own_copy(make_tiny, tmp_path):
    """A model folder that a test may change."""
    return shutil.copytree(make_tiny("llama"), tmp_path / "disk" / "model")


def test_files_linked_from_another_place_are_read(own_copy, tmp_path):
    whole = open_checkpoint(own_copy).total_bytes
    folder = linked(own_copy, tmp_path / "model")
    assert open_checkpoint(folder).total_bytes == whole
    again = linked(folder, tmp_path / "again")  # links to links
    assert open_checkpoint(again).total_bytes == whole


def test_a_link_to_something_of_another_kind_is_not_followed(own_copy, tmp_path):
    folder = linked(own_copy, tmp_path / "model", "secret")
    with pytest.raises(CheckpointError, match=r"does not end in .json as the link does, so it may"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["../disk/model/config.json", "link/../disk/model/config.json"])
def test_a_name_that_climbs_is_not_followed(own_copy, tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(folder)
    with (
        pytest.raises(CheckpointError, match="leads out of the model folder"),
        files.open_inside(folder, name),
    ):
        pass


ME, ROOT, OTHER, THIRD = 1000, 0, 2000, 3000


@pytest.mark.parametrize(
    ("who", "link", "file", "followed"),
    [
        (ME, ME, ME, True),
        (ME, ME, OTHER, True),  # my link to the group's models
        (ME, ROOT, OTHER, True),
        (ME, OTHER, OTHER, True),  # a service's models, linked by itself
        (ME, OTHER, ME, False),  # somebody wants me to read what is mine
        (ME, OTHER, THIRD, False),
        (ROOT, OTHER, ROOT, False),
    ],
)
def test_whose_links_are_followed(tmp_path, monkeypatch, who, link, file, followed):
    monkeypatch.setattr(os, "geteuid", lambda: who)
    monkeypatch.setattr(os, "lstat", lambda _: SimpleNamespace(st_uid=link))
    monkeypatch.setattr(os, "stat", lambda _: SimpleNamespace(st_uid=file))
    place = tmp_path / "config.json"
    reason = files._why_not_followed([place], place, tmp_path / "far" / "config.json")
    assert (reason == "") == followed
    assert followed or f"by a link of user {link} to a file of user {file}" in reason


def test_what_the_kernel_makes_up_is_not_followed(own_copy):
    (own_copy / "config.json").unlink()
    (own_copy / "config.json").symlink_to("/proc/self/cmdline")
    with pytest.raises(CheckpointError, match="which is no file of a model: remove the link"):
        open_checkpoint(own_copy)


def in_cache(folder, hub, repo="acme--tiny", commit=COMMIT, ref="main"):
    """The layout of huggingface_hub; returns the repository."""
    repository = hub / f"models--{repo}"
    snapshot = repository / "snapshots" / commit
    for place in (snapshot, repository / "blobs", repository / "refs"):
        place.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, repository / "blobs" / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    if ref:
        (repository / "refs" / ref).write_text(commit)
    return repository


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("part", ["blobs", "", ".."])
def test_any_part_of_a_cache_may_be_a_link(own_copy, tmp_path, hub, part):
    place = in_cache(own_copy, hub) / part if part != ".." else hub
    if part == "..":
        in_cache(own_copy, hub)
    real = place.rename(tmp_path / "elsewhere")
    place.symlink_to(real)
    assert open_checkpoint(resolve_model("acme/tiny")).files


def test_without_a_ref_the_only_snapshot_is_taken(own_copy, hub, caplog):
    repository = in_cache(own_copy, hub, ref="")
    assert resolve_model("acme/tiny") == repository / "snapshots" / COMMIT
    assert "its only snapshot is taken" in caplog.text


def test_without_a_ref_several_snapshots_are_named(own_copy, hub):
    in_cache(own_copy, hub, ref="")
    in_cache(own_copy, hub, commit="f" * 40, ref="")
    with pytest.raises(CheckpointError, match=f"there are @{COMMIT}, @{'f' * 40}: download it"):
        resolve_model("acme/tiny")
    assert resolve_model(f"acme/tiny@{'f' * 40}").name == "f" * 40


def test_what_is_missing_of_a_snapshot_is_named_with_what_gets_it(make_tiny, tmp_path, hub):
    repository = in_cache(make_tiny("llama"), hub)
    (repository / "snapshots" / COMMIT / "model.safetensors").unlink()
    folder = resolve_model("acme/tiny")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert f"`hf download acme/tiny --revision {COMMIT}`, or add --download" in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("https://huggingface.co/acme/tiny", "acme/tiny"),
        ("https://huggingface.co/acme/tiny/", "acme/tiny"),
        ("huggingface.co/acme/tiny/tree/main", "acme/tiny@main"),
        ("https://hf.co/acme/tiny/blob/v2/config.json?download=true#x", "acme/tiny@v2"),
        ("hf.co/acme/tiny", "acme/tiny"),
        ("hf://acme/tiny", "acme/tiny"),
        ("acme/tiny@v2", "acme/tiny@v2"),
        ("gpt2", "gpt2"),
    ],
)
def test_addresses_of_the_hub_are_ids(hub, typed, found):
    assert str(hub_id_of(typed)) == found
    with pytest.raises(CheckpointError, match=f"{found} is neither a folder nor a model in"):
        resolve_model(typed)


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (
            "qwen3:8b",
            "a name with a tag, as ollama has them: give the .gguf file itself",
        ),
        ("hf.co/acme/tiny:Q4_K_M", "a name with a tag"),
        ("https://example.org/acme/tiny", "does not exist: give a model folder or a hub id"),
        ("https://huggingface.co/acme/tiny/../../x", "does not exist"),
    ],
)
def test_names_of_other_places_get_a_sentence(hub, typed, says):
    with pytest.raises(CheckpointError) as caught:
        resolve_model(typed)
    assert says in str(caught.value)


def test_a_file_in_place_of_the_folder(own_copy, tmp_path, monkeypatch):
    assert resolve_model(str(own_copy / "config.json")) == own_copy
    monkeypatch.chdir(own_copy)
    assert open_checkpoint(resolve_model("config.json")).folder == own_copy
    with pytest.raises(CheckpointError, match=f"is a file of the model folder {own_copy}: give"):
        resolve_model(str(own_copy / "model.safetensors"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(2**20))
    with pytest.raises(CheckpointError, match=r"x.gguf is of version 0: read are versions 2 and 3"):
        resolve_model(str(tmp_path / "x.gguf"))
