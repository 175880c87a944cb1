"""What the probe found is kept for later commands, and only for what it was found of."""

import dataclasses
import json
import os
import sys
import time

import forks
import pytest
import torch

from offload_rt.device.cuda import torch_driver
from offload_rt.device.kinds import CPU
from offload_rt.errors import CheckpointError
from offload_rt.kv.base import NO_KV, KVShape
from offload_rt.model import fits, probe, sparing
from offload_rt.model import network as network_module
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.exact import Looks
from offload_rt.model.fits import Fit, fit_key, keep_fit, kept_fit
from offload_rt.model.mixing import Mixer
from offload_rt.model.network import Network


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Begin another command; what probes run then is counted in the result."""
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path))
    monkeypatch.setattr(sparing, "_asked", {"a command"})
    monkeypatch.setattr(sparing, "_COMPUTES_SHAPES", {"sys"})  # is there, so nothing is forked
    ran, probed = [], probe._probed

    def begin():
        monkeypatch.setattr(probe, "_fit", {})
        monkeypatch.setattr(fits, "_looks", {})
        monkeypatch.setattr(probe, "_probed", lambda *args: ran.append(1) or probed(*args))
        ran.clear()
        return ran

    return begin


def network_of(folder, dtype="float32"):
    return Network(open_checkpoint(folder), dtype, CPU.packing)


def test_a_family_is_probed_once_for_all_commands(command, make_tiny, monkeypatch):
    folder = make_tiny("llama")
    ran = command()
    first = network_of(folder)
    assert len(ran) == 1
    ran = command()
    second = network_of(folder)
    assert not ran
    assert second.kv_shapes == first.kv_shapes and len(first.kv_shapes) == 2
    network_of(folder, "bfloat16")
    network_of(make_tiny("llama", rms_norm_eps=0.25))
    assert len(ran) == 2  # another number format, another configuration


def test_a_verdict_is_kept_whole_and_not_by_other_code(command, monkeypatch):
    command()
    mixer = Mixer(layer=1, path="a.b", keyword="k", state_bytes=7, hidden_bytes=9)
    fit = Fit((KVShape(heads=2, key_dim=8, value_dim=4), NO_KV), {"m.experts": 2}, (mixer,), 3)
    keep_fit("one", fit)
    keep_fit("two", dataclasses.replace(fit, in_tuples=0))
    assert kept_fit("one") == fit and kept_fit("two") == dataclasses.replace(fit, in_tuples=0)
    assert kept_fit("three") is None
    (fits.cache_folder() / "fits.json").write_text(
        json.dumps({"version": 1, "entries": {"one": 3}})
    )
    assert kept_fit("one") is None


def test_other_code_and_other_versions_ask_anew(make_tiny, monkeypatch):
    config = open_checkpoint(make_tiny("llama")).config
    keys = {fit_key(config, torch.float32)}
    with monkeypatch.context() as patched:
        patched.setattr(fits, "_ours", lambda: ("changed",))
        keys.add(fit_key(config, torch.float32))
    monkeypatch.setattr(fits.transformers, "__version__", "0")
    keys.add(fit_key(config, torch.float32))
    assert len(keys) == 3


def test_what_is_refused_is_found_anew(command, make_tiny, monkeypatch):
    folder = make_tiny("llama", rms_norm_eps=0.125)
    command()

    def refuse(*_):
        raise CheckpointError("of a reason")

    monkeypatch.setattr(probe, "_probed", refuse)
    with pytest.raises(CheckpointError, match="llama models cannot be streamed: of a reason"):
        network_of(folder)
    ran = command()
    network_of(folder)
    assert len(ran) == 1


def test_who_has_us_as_a_library_is_asked_each_time(command, make_tiny, monkeypatch):
    folder = make_tiny("llama", rms_norm_eps=0.0625)
    monkeypatch.setattr(sparing, "_asked", set())
    for _ in range(2):
        ran = command()
        network_of(folder)
        assert len(ran) == 1
    assert not (fits.cache_folder() / "fits.json").exists()


def test_modules_are_made_without_drawing_on_meta(make_tiny, monkeypatch):
    folder = make_tiny("llama")  # drawn now, if no test did before
    drawn, normal = [], torch.nn.init.normal_

    def draw(tensor, *rest):
        drawn.append(tensor)
        return normal(tensor, *rest)

    monkeypatch.setattr(torch.nn.init, "normal_", draw)
    network_of(folder)
    assert not drawn
    assert torch.nn.init.normal_(torch.zeros(9)).count_nonzero() and len(drawn) == 1


def test_what_a_network_computes_is_looked_at_once_for_all_commands(command, make_tiny):
    command()
    network, looked = network_of(make_tiny("llama")), []
    (fits.cache_folder() / "looks.json").unlink()  # of the probe, which looks as well
    found = Looks(problem="of a reason", regular=True, shapes=frozenset({(8, 16), (4, 2)}))

    def find():
        looked.append(1)
        return found

    first, again = (fits.looks(network._model, network._config, find) for _ in range(2))
    assert first == again == found and len(looked) == 1
    network._model.config_of_another = torch.nn.Dropout()  # as formats put other modules there
    assert fits.looks(network._model, network._config, find) == found and len(looked) == 2


def test_what_a_fork_finds_is_known_here_and_nothing_else_of_it(monkeypatch):
    monkeypatch.setattr(sparing, "_asked", {"a command"})
    monkeypatch.setattr(sparing, "_COMPUTES_SHAPES", {"what nobody imported"})
    here = []

    def find():
        here.append(1)
        return {"found": [len(here), os.getpid()]}

    (count, who) = sparing.apart(find)["found"]
    assert count == 1 and who != os.getpid() and not here

    def refuse():
        raise CheckpointError("of a reason")

    with pytest.raises(CheckpointError, match="^of a reason$"):
        sparing.apart(refuse)
    parent = os.getpid()
    assert sparing.apart(lambda: "here" if os.getpid() == parent else 1 / 0) == "here"
    monkeypatch.setattr(sparing, "_LONGEST_S", 0.05)  # a lock that a thread held when it was forked
    assert sparing.apart(lambda: "here" if os.getpid() == parent else time.sleep(99)) == "here"
    monkeypatch.setattr(torch_driver, "uses_gpu", lambda: True)
    assert sparing.apart(os.getpid) == parent


def test_a_first_command_keeps_what_the_fork_saw_of_products(command, make_tiny, monkeypatch):
    command()
    network = network_of(make_tiny("llama", rms_norm_eps=0.03125))
    monkeypatch.setattr(network_module, "looks_of", lambda *_: pytest.fail("looked again"))
    network.exact_problem(torch.device("cpu"), limit_bytes=2**30)


def test_a_process_looks_once_at_what_a_model_computes(make_tiny, monkeypatch):
    """Each setting of a sweep, and a server's next model of the same files, is the same one."""
    monkeypatch.setattr(fits, "_looks", {})
    looked, real = [], network_module.looks_of
    monkeypatch.setattr(network_module, "looks_of", lambda *a: looked.append(1) or real(*a))
    mixture = {"num_local_experts": 4, "num_experts_per_tok": 2}
    for model in (("llama", {}), ("llama", {"rms_norm_eps": 0.0625}), ("mixtral", mixture)):
        looked.clear()
        seen = []
        for _ in range(2):
            network = network_of(make_tiny(model[0], **model[1]))
            network.exact_problem(torch.device("cpu"), limit_bytes=2**30)
            seen.append(network._looks)
        assert len(looked) == 1 and seen[0] == seen[1]
    assert seen[0].regular and len(fits._looks) == 3


def test_files_of_models_are_looked_through_once():
    """What transformers knows of them then is what a second look would tell."""
    seen = """
from transformers import models
from transformers.utils.import_utils import define_import_structure as look
asked, told = look.cache_info().misses, look(models.__file__)
print(look.cache_info().misses - asked)
known = [(name, one) for name, given in models._import_structure.items() for one in given]
told = [(name, one) for of in told.values() for name, given in of.items() for one in given]
print(sorted(known) == sorted(told))
"""
    assert forks.run([sys.executable, "-c", seen]).stdout.split() == ["1", "True"]
