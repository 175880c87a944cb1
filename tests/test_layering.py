"""Imports point down, what must start fast imports no torch, and nothing unpickles or evals."""

import ast
import gc
import graphlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from offload_rt.config import DRAFTERS

PROJECT = Path(__file__).parent.parent
ROOT = PROJECT / "offload_rt"
# Low to high; the longest matching prefix of a module's name decides. A module may import modules
# of a lower rank and of its own package, so two packages of one rank do not know each other.
RANKS = [
    ["printable"],
    ["errors"],
    ["units", "reading", "folders"],
    ["writing"],
    ["entries"],
    ["options"],
    ["config", "report", "trace"],
    ["device"],
    ["kernels"],
    ["attention"],
    ["streaming"],
    ["kv"],
    ["model", "sampling"],
    ["profiling"],
    ["costs"],
    ["runner"],
    ["text", "adapters"],
    ["speculative"],
    ["planning"],
    ["nodes"],
    ["engine"],
    ["training"],  # settings and talks are for the command line too, and free of torch
    ["session"],
    ["baselines"],
    ["integrations", "serve"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
TORCH_FREE = {
    *(
        "printable",
        "errors",
        "units",
        "reading",
        "folders",
        "writing",
        "entries",
        "options",
        "config",
        "report",
        "trace",
    ),
    *("costs", "planning", "text", "session", "cli", "__main__"),
    *("serve.guards", "serve.wire"),
    *(
        "attention.blocks",
        "device.base",
        "device.cgroup",
        "device.compiled",
        "device.kinds",
        "device.link_meter",
        "device.sim",
    ),
    *("device.system", "device.cuda.nvml", "device.cuda.present"),
    *("streaming.direct_io", "streaming.ring", "kv.recent_share", "kv.sizes"),
    *("model.adapter", "model.checkpoint", "model.config", "model.config_class", "model.files"),
    *("model.formats.base", "model.kinds", "model.layout", "model.locate", "model.outline"),
    *("profiling.adjust", "profiling.codec", "profiling.curves", "profiling.effort"),
    *("profiling.identity", "profiling.profile", "profiling.rates", "profiling.records"),
    *("profiling.store", "adapters.reading", "speculative.draft_model.pair"),
    *("speculative.ngram.suffixes", "speculative.medusa.calibration"),
    *("speculative.medusa.checkpoint", "speculative.medusa.names", "speculative.medusa.trees"),
    "speculative.mtp.checkpoint",
    *("training.settings", "training.talks"),
    *("baselines.cap", "baselines.comparison", "baselines.engines", "baselines.pagecache"),
    *("baselines.process", "baselines.rows", "baselines.summary"),
}
TORCH_FREE |= {"speculative.kind", "speculative.kinds"}
TORCH_FREE |= {f"speculative.{kind.folder}.kind" for kind in DRAFTERS.values() if kind.folder}
# The finder refuses torch and notes the nearest line of our own that asked for it, so an import
# inside try/except is found too. transformers and accelerate import torch.
PROBE = """
import importlib, os, sys, traceback

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "accelerate"}:
            here = os.getcwd() + os.sep
            stack = [f for f in traceback.extract_stack() if "site-packages" not in f.filename]
            frames = [f for f in stack if f.filename.startswith(here)]
            at = f"{frames[-1].filename.removeprefix(here)}:{frames[-1].lineno}" if frames else "?"
            print(f"  {module}: {name} is imported at {at}")
            raise ImportError(name)

sys.path.insert(0, os.getcwd())
sys.meta_path.insert(0, Watch())
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(f"  {module}: {error}")
"""


def name_of(path):
    """The module's name without `offload_rt.`; "" is the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


@cache
def nodes_of(source):
    """All that a source consists of; a collection would look through all sources again."""
    gc.disable()
    try:
        return [*ast.walk(ast.parse(source))]
    finally:
        gc.enable()


@cache
def imports_of(source):
    """Its imports, wherever they are."""
    return [node for node in nodes_of(source) if isinstance(node, ast.Import | ast.ImportFrom)]


def in_all(wrong, files):
    """What `wrong` finds, by module; it is asked for source, module and whether that is a package.

    One test for all modules: what a test costs beside its own work, 600 times, is seconds.
    """
    found = {m: wrong(FILES[m].read_text(), m, FILES[m].name == "__init__.py") for m in files}
    return {module: sentences for module, sentences in found.items() if sentences}


def covering(table, module):
    """The most specific name in `table` that covers `module`, or None."""
    covers = [name for name in table if module == name or module.startswith(name + ".")]
    return max(covers, key=len, default=None)


def rank_of(module):
    name = covering(RANK, module)
    assert name is not None, (
        f"offload_rt.{module} has no rank: add it to RANKS in tests/test_layering.py"
    )
    return RANK[name]


def same_package(one, other):
    return one.split(".")[0] == other.split(".")[0]


def targets(node, module, is_package):
    """Full names of the modules that an import statement in `module` names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            here = ["offload_rt", *filter(None, module.split("."))]
            here = here[: len(here) - node.level + is_package]
            base = ".".join([*here, base] if base else here)
        if base == "offload_rt" or base.startswith("offload_rt."):
            inner = base.removeprefix("offload_rt").removeprefix(".")
            for alias in node.names:  # `from offload_rt import units` names a module
                name = f"{inner}.{alias.name}".removeprefix(".")
                yield f"offload_rt.{name}" if name in FILES else base
        else:
            yield base


def upward_imports(source, module, is_package=False):
    """What breaks the rule, as sentences."""
    mine, wrong = rank_of(module), []
    for node in imports_of(source):
        for target in dict.fromkeys(targets(node, module, is_package)):
            other = target.removeprefix("offload_rt.")
            inside = other != target and not same_package(module, other)
            if inside and rank_of(other) >= mine:
                wrong.append(f"line {node.lineno}: offload_rt.{module} imports {target}")
    return wrong


def find_heavy(folder, names):
    """Import modules in a fresh Python; a line for each that imports torch, with the place."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *names],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def unsafe_uses(source, module="", is_package=False):
    """Ways to run code that came with a model, as sentences."""
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    wrong = []
    for node in imports_of(source):
        for target in targets(node, module, is_package):
            if target.split(".")[0] in modules:
                wrong.append(f"line {node.lineno}: imports {target}")
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            loads = any(alias.name == "load" for alias in node.names)
            wrong += [f"line {node.lineno}: imports torch.load"] * loads
    for node in nodes_of(source):
        if isinstance(node, ast.Attribute) and node.attr == "load":
            wrong += [f"line {node.lineno}: torch.load"] * (ast.unparse(node) == "torch.load")
        elif isinstance(node, ast.Name) and node.id in {"eval", "exec"}:
            wrong.append(f"line {node.lineno}: {node.id}()")
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            wrong += [f"line {node.lineno}: {node.arg}"] * (ast.unparse(node.value) != "False")
    return wrong


def test_imports_point_down():
    assert in_all(upward_imports, filter(None, FILES)) == {}


def test_the_tower_has_every_floor():
    """The table of docs/ARCHITECTURE.md names each package, and each module beside them."""
    page = (PROJECT / "docs" / "ARCHITECTURE.md").read_text()
    tower = page.partition("## The tower")[2].partition("## Five trips")[0]
    first = [line.split("|")[1] for line in tower.splitlines() if line.startswith("| ")]
    rows = " ".join(first) + tower.partition("| ground |")[2]
    packages = {name for name in RANK if (ROOT / name).is_dir()}
    named = {f"`{name}/`" for name in packages}
    named |= {f"`offload_rt/{name}.py`" for name in RANK.keys() - packages - {"__main__"}}
    assert {name for name in named if name not in rows} == set()


def uses_console(source, module, is_package=False):
    """What of a command line a module imports."""
    nodes = imports_of(source)
    named = {t.split(".")[0] for node in nodes for t in targets(node, module, is_package)}
    return sorted(named & {"click", "rich", "prompt_toolkit", "sys"})


def test_a_session_knows_no_command_line():
    assert in_all(uses_console, [name for name in FILES if name.startswith("session")]) == {}
    assert uses_console("def f():\n    from rich.text import Text", "session.x") == ["rich"]


HARNESS = ("baselines", "cli.compare")  # measures others; the program runs without it


def uses_harness(source, module, is_package=False):
    """Modules of the comparison harness that a module imports."""
    return [
        target
        for node in imports_of(source)
        for target in targets(node, module, is_package)
        if target.removeprefix("offload_rt.").startswith(HARNESS)
    ]


def test_only_the_comparison_imports_its_harness():
    others = [name for name in FILES if not name.startswith(HARNESS)]
    assert in_all(uses_harness, others) == {}


def test_planted_uses_of_the_harness_are_found():
    source = "def f():\n    from offload_rt.baselines.rows import x\nimport offload_rt.cli.compare"
    found = ["offload_rt.baselines.rows", "offload_rt.cli.compare"]
    assert sorted(uses_harness(source, "cli.bench")) == found
    assert uses_harness("from .compare import y", "cli.bench") == found[1:]


DOOR = "model.modelling"  # leaves torch's compiler out, of which importing takes 8 s on two cores


def passes_by_the_door(source, module, is_package=False):
    """Names of transformers that a module imports when it is imported itself; the bare is lazy."""
    body = nodes_of(source)[0].body
    top = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    return [
        ast.unparse(node)
        for node in top
        for target in targets(node, module, is_package)
        if target.startswith("transformers") and ast.unparse(node) != "import transformers"
    ]


def test_modelling_is_imported_through_one_door():
    """A direct import, if it is the first, has torch's compiler imported into a command."""
    others = [name for name in FILES if name != DOOR and not name.startswith("baselines.workers")]
    assert in_all(passes_by_the_door, others) == {}
    assert passes_by_the_door("from transformers import LlamaConfig", "profiling.compute")
    assert passes_by_the_door("import json, transformers.models as m", "profiling.compute")
    assert not passes_by_the_door("def f():\n    from transformers import X", "model.x")


def circle(files):
    """Files that import each other, in turn; empty if none do."""
    graph = {}
    for module, (source, is_package) in files.items():
        nodes = imports_of(source)
        named = {target for node in nodes for target in targets(node, module, is_package)}
        graph[module] = {name.removeprefix("offload_rt.") for name in named} & files.keys() - {
            module
        }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_files_import_each_other():
    files = {m: (p.read_text(), p.name == "__init__.py") for m, p in FILES.items() if m}
    assert circle(files) == []


def test_a_planted_circle_is_found():
    lazy = "def f():\n    from offload_rt.kv.resident import x"
    files = {"kv.base": (lazy, False), "kv.resident": ("import offload_rt.kv.base", False)}
    assert set(circle(files)) == {"kv.base", "kv.resident"}
    assert circle(files | {"kv.base": ("import json", False)}) == []


def test_no_torch_at_import_time():
    names = [name for name in FILES if name == "" or covering(TORCH_FREE, name)]
    found = find_heavy(PROJECT, [f"offload_rt.{name}".rstrip(".") for name in names])
    assert not found, f"these must import without torch:\n{found}"


def test_nothing_is_unpickled_or_evaluated():
    assert in_all(unsafe_uses, FILES) == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("costs.pass_cost", "import offload_rt.engine"),
        ("costs.pass_cost", "from offload_rt import engine"),
        ("costs.pass_cost", "def f():\n    from offload_rt.cli.plan import x"),
        ("costs.pass_cost", "from ..engine import Engine"),
        ("kv.base", "from offload_rt.model.attention_function import attend_packed"),
        ("attention.rows", "from offload_rt.kv.base import KVCache"),
        ("kv.base", "from offload_rt.runner import tree"),
        ("kv.resident", "import offload_rt.model.network"),
        ("config", "from offload_rt.report import Report"),
        ("errors", "import offload_rt.config"),
        ("runner.tree", "import offload_rt.speculative.medusa.heads"),
    ],
)
def test_planted_upward_imports_are_found(module, source):
    assert upward_imports(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("costs.pass_cost", "from offload_rt.model.checkpoint import extents"),
        ("costs.pass_cost", "from offload_rt.costs.timeline import x\nimport torch, math"),
        ("costs.pass_cost", "from .timeline import x"),
        ("kv.resident", "from offload_rt.attention.rows import attend_rows"),
        ("model.attention_function", "from offload_rt.kv.base import KVCache"),
        ("kv.base", "from offload_rt.device.base import Buffer\nfrom offload_rt import errors"),
        ("speculative.medusa.heads", "import offload_rt.runner.tree"),
        ("cli.plan", "import offload_rt.engine, offload_rt.serve.app, offload_rt"),
    ],
)
def test_downward_imports_are_accepted(module, source):
    assert upward_imports(source, module) == []


def test_a_module_without_rank_is_named():
    with pytest.raises(AssertionError, match="offload_rt.novelty.part has no rank"):
        upward_imports("import json", "novelty.part")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch", True),
        ("try:\n    import torch.nn as nn\nexcept ImportError:\n    pass", True),
        ("class A:\n    from transformers import AutoConfig", True),
        ("from safetensors.torch import load_file", True),
        ("from planted.other import x", True),
        ("def f():\n    import torch", False),
        ("TYPE_CHECKING = False\nif TYPE_CHECKING:\n    import torch", False),
        ("import json, safetensors", False),
    ],
)
def test_planted_heavy_imports_are_found(source, found, tmp_path):
    package = tmp_path / "planted"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "other.py").write_text("import torch\nx = 1\n")
    (package / "light.py").write_text(source)
    assert bool(find_heavy(tmp_path, ["planted.light"])) is found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", True),
        ("from marshal import loads", True),
        ("def f():\n    import dill.source", True),
        ("state = torch.load(path, weights_only=True)", True),
        ("from torch import load", True),
        ("eval('1')", True),
        ("exec(code)", True),
        ("M.from_pretrained(x, trust_remote_code=True)", True),
        ("M.from_pretrained(x, trust_remote_code=flag)", True),
        ("M.from_pretrained(x, trust_remote_code=False)", False),
        ("model.eval()\ntorch.save\nsafetensors.torch.load_file(p)", False),
    ],
)
def test_planted_unsafe_uses_are_found(source, found):
    assert bool(unsafe_uses(source)) is found


def opens_ports(source):
    """Whether a module listens, or starts what does."""
    names = {"bind", "create_server", "start_server", "TCPStore", "rendezvous"}
    calls = [node.func for node in nodes_of(source) if isinstance(node, ast.Call)]
    called = {getattr(each, "attr", getattr(each, "id", "")) for each in calls}
    starts = (each for each in calls if getattr(each, "attr", "") == "init")
    return bool(called & names or any(ast.unparse(each) == "ray.init" for each in starts))


def test_ports_are_opened_where_security_says():
    found = {
        p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py") if opens_ports(p.read_text())
    }
    assert found == {"nodes/joining.py", "serve/running.py", "serve/spread.py"}
    said = (PROJECT / "SECURITY.md").read_text()
    assert "Ports are opened by `serve`, `--nodes` and `--ray local` only." in said
