"""Nothing comes in with the data: no code, no path out of a folder, no file that is not what it says it is."""

import ast
import json
import pickle
import re
import struct
import subprocess
import sys
import time
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from conftest import random_ids, tiny_model
from safetensors.torch import load_file, save_file
from test_gate import TEXTS, make_model, make_tokenizer

from helpers.gate.gate import EntropyGate
from helpers.io.atomic import inside
from helpers.io.paths import ROOT
from helpers.models import hub
from helpers.models.loading import load_model
from helpers.policies.features import TokenFeatures
from helpers.policies.learned import SETTLE_FEATURES, LearnedController
from helpers.policies.network import Network
from helpers.policies.rules import EntropyRule
from helpers.training.costs import load_or_measure_costs

MODULES = sorted([*(ROOT / "helpers").rglob("*.py"), ROOT / "main.py"])
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def code_of(path: Path) -> ast.Module:
    if path.suffix == ".py":
        return ast.parse(path.read_text(encoding="utf-8"))
    cells = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    return ast.parse("\n".join(re.sub(r"(?m)^\s*[%!].*$", "pass", cell) for cell in cells))


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or an attribute; "" of anything else at the root."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ".".join(["", *reversed(parts)])


# What code and data have in common in Python


EXECUTES = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path", "runpy.run_module"}
UNPICKLES = {
    "torch.load",
    "torch.save",
    "np.load",
    "np.save",
    "numpy.load",
    "joblib.load",
    "pd.read_pickle",
    "yaml.load",
}
PICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}


def offences(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"line {node.lineno}: imports {name}" for name in names if name.split(".")[0] in PICKLERS]
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        if called in EXECUTES | UNPICKLES or called.endswith((".read_pickle", ".to_pickle")):
            found.append(f"line {node.lineno}: calls {called}")
        told = {keyword.arg: getattr(keyword.value, "value", keyword.value) for keyword in node.keywords}
        if told.get("shell", False) is not False or told.get("trust_remote_code", False) is not False:
            found.append(f"line {node.lineno}: {called} with shell or trust_remote_code")
        if told.get("allow_pickle", False) is not False or told.get("weights_only", True) is not True:
            found.append(f"line {node.lineno}: {called} lets pickles in")
        sound = told.get("use_safetensors") is True or "gguf_file" in told
        guarded = sound and "trust_remote_code" in told
        if called.startswith("AutoModel") and called.endswith(".from_pretrained") and not guarded:
            found.append(
                f"line {node.lineno}: {called} without use_safetensors=True (or gguf_file) and trust_remote_code=False"
            )
    return found


@pytest.mark.parametrize("path", [*MODULES, *NOTEBOOKS], ids=name_of)
def test_code_never_runs_or_unpickles_data(path):
    assert offences(code_of(path)) == []


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "exec(open(path).read())",
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "pd.read_pickle(path)",
        "table.to_pickle(path)",
        "subprocess.run(f'rm {name}', shell=True)",
        "os.system(command)",
        "AutoModelForCausalLM.from_pretrained(name)",
        "AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=flag)",
    ],
)
def test_the_walk_sees_what_it_is_looking_for(line):
    assert offences(ast.parse(line))
    assert not offences(ast.parse("model.eval()\nsubprocess.Popen([sys.executable, name])"))


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "it ran"


class Bomb:
    """Unpickling it runs code."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def copy_of(folder: Path, tmp_path: Path, config: dict | None = None, tokenizer: dict | None = None) -> Path:
    """A copy of a model's folder with entries added to two of its files."""
    copy = tmp_path / "model"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    for name, more in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | (more or {})))
    return copy


def test_pickled_weights_are_not_opened(tiny_folder, tmp_path, marker):
    copy = copy_of(tiny_folder, tmp_path)
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ValueError, match="no model in safetensors format"):
        load_model(copy, quiet=True)
    (copy / "model.safetensors").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(Exception, match="header"):
        load_model(copy, quiet=True)
    assert not marker.exists()


@pytest.mark.parametrize("model_type", ["llama", "a type of its own"])
def test_code_that_comes_with_a_model_is_not_run(tiny_folder, tmp_path, marker, model_type, monkeypatch):
    """Nor is anybody asked whether it may: the answer to a question would come from whoever sits there."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    copy = copy_of(
        tiny_folder, tmp_path, {"model_type": model_type, "auto_map": code},
        {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}},
    )  # fmt: skip
    (copy / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nConfig = Model = Tokenizer = dict"
    )
    if model_type == "llama":
        assert load_model(copy, device="cpu", quiet=True)[0].config.model_type == "llama"
    else:
        with pytest.raises(ValueError, match=r"(?s)no model in safetensors format .*trust_remote_code"):
            load_model(copy, quiet=True)
    assert not marker.exists()


# Names


@pytest.mark.parametrize("name", ["../seed", "..", ".", "", "a/b", "/etc/passwd", "..\\seed", "C:seed", "seed\0"])
def test_names_of_controllers_stay_in_their_folder(name, tmp_path):
    with pytest.raises(ValueError, match="name must be that of a file in"):
        inside(tmp_path, name)
    if name not in ("..", ".", ""):  # these get an ending and are plain names
        for call in (LearnedController.load, lambda f, n: network().save(f, n, {})):
            with pytest.raises(ValueError, match=r"name must be that of a file in .*, without a path, got "):
                call(tmp_path / "folder", name)
    assert list(tmp_path.rglob("*")) == []


def test_names_of_thresholds_and_downloads_are_made_of_hashes_and_plain_signs(tmp_path):
    tokenizer = make_tokenizer()
    small = make_model(tokenizer, 0)
    small.config._name_or_path = "../../elsewhere"
    small.config.note = "../../../etc/passwd"
    EntropyGate.calibrate(small, tokenizer, ["../../x " * 3, *TEXTS], cache_dir=tmp_path / "cache", progress=False)
    assert [path.parent.name for path in tmp_path.rglob("*") if path.is_file()] == ["cache"]
    assert re.fullmatch(r"threshold-[0-9a-f]{16}\.json", next((tmp_path / "cache").iterdir()).name)
    with pytest.raises(ValueError, match="signal must be one of"):
        EntropyGate.calibrate(small, tokenizer, TEXTS, signal="../x", cache_dir=tmp_path / "other")
    assert hub._bytes_here("model", "../../../../../../usr") == 0
    with pytest.raises(hub.HubError, match="neither a folder here nor the name of a hub repository"):
        hub.fetch_model("../../no/such/folder")


def test_a_threshold_file_that_was_tampered_with_is_not_believed(tmp_path):
    tokenizer = make_tokenizer()
    small = make_model(tokenizer, 0)
    gate = EntropyGate.calibrate(small, tokenizer, TEXTS, cache_dir=tmp_path, progress=False)
    (path,) = tmp_path.iterdir()
    sound = path.read_text()
    for content in ("[" * 100000, sound.replace('"threshold": ', '"threshold": "x", "t": '), "", "null", "{}", "\0"):
        path.write_text(content)
        assert EntropyGate.calibrate(small, tokenizer, TEXTS, cache_dir=tmp_path, progress=False) == gate
        assert path.read_text() == sound


# Controller files


def network(outputs: int = 4) -> Network:
    torch.manual_seed(0)
    return Network.create(("entropy", "rarity"), torch.randn(20, 2), (8, 4), outputs)


ABOUT = {"label": "kv_bits", "model": "made up", "rates": {"4.0": 0.5}, "token_counts": {"7": 3}}


@pytest.fixture
def controller(tmp_path):
    """A sound controller named "imitation"; both its files can be written anew."""
    network().save(tmp_path, "imitation", ABOUT)
    assert LearnedController.load(tmp_path, "imitation").rates == {4.0: 0.5}
    return tmp_path


def rewrite(folder: Path, tensors=None, **about) -> None:
    """The controller with other tensors or another description, which is then the one of the JSON."""
    old = load_file(folder / "imitation.safetensors")
    save_file(old if tensors is None else tensors(old), folder / "imitation.safetensors")
    content = json.loads((folder / "imitation.json").read_text())
    (folder / "imitation.json").write_text(json.dumps(content | about))


TENSORS = {
    "double precision": lambda t: {k: v.double() for k, v in t.items()},
    "half precision": lambda t: {k: v.half() for k, v in t.items()},
    "whole numbers": lambda t: {**t, "layers.0.weight": t["layers.0.weight"].long()},
    "one tensor more": lambda t: {**t, "layers.6.weight": torch.zeros(4, 4)},
    "one tensor less": lambda t: {k: v for k, v in t.items() if k != "layers.4.bias"},
    "another shape": lambda t: {**t, "layers.2.weight": torch.zeros(8, 4)},
    "no dimension": lambda t: {**t, "mean": torch.tensor(1.0)},
    "a name with a path": lambda t: {**t, "../../layers.0.bias": torch.zeros(8)},
    "other outputs": lambda t: {**t, "layers.4.weight": torch.zeros(3, 4), "layers.4.bias": torch.zeros(3)},
}


@pytest.mark.parametrize("change", TENSORS)
def test_tensors_that_are_not_the_described_ones_are_refused(controller, change):
    rewrite(controller, TENSORS[change])
    message = (
        r"controller imitation\.safetensors: its weights do not fit its description: .* expected .* for 2 features"
    )
    with pytest.raises(ValueError, match=message):
        LearnedController.load(controller, "imitation")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(controller, value):
    rewrite(controller, lambda t: {**t, "layers.0.bias": torch.full((8,), value)})
    with pytest.raises(ValueError, match=r"controller imitation\.safetensors: holds NaN or infinity"):
        LearnedController.load(controller, "imitation")
    rewrite(controller, lambda t: {**t, "layers.0.bias": torch.zeros(8), "scale": torch.tensor([1.0, 0.0])})
    with pytest.raises(ValueError, match="scales of its inputs must be positive"):
        LearnedController.load(controller, "imitation")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"hidden": [10**12, 10**12]}, "do not fit its description"),
        ({"hidden": [8] * 100000}, "do not fit its description"),
        ({"hidden": [-8, 4]}, "do not fit its description"),
        ({"hidden": [1e300, 4]}, "do not fit its description"),
        ({"hidden": [float("inf")]}, "cannot be read .OverflowError"),
        ({"hidden": "a lot"}, "cannot be read .ValueError"),
        ({"hidden": {"a": 1}}, "cannot be read .ValueError"),
        ({"hidden": None}, "cannot be read .TypeError"),
        ({"features": ["entropy", "__class__"]}, r"reads unknown feature\(s\) \['__class__'\]"),
        ({"features": ["entropy", "slice"]}, r"reads unknown feature\(s\) \['slice'\]"),
        ({"features": ["entropy", "../rarity"]}, r"unknown feature\(s\) \['../rarity'\]; known are \['entropy', "),
        ({"features": 3}, "cannot be read .TypeError"),
        ({"rates": {"4.0": float("nan")}}, "its rates must be finite and its token counts 0 or more"),
        ({"rates": {"four": 1.0}}, "its rates or token counts are no numbers"),
        ({"rates": [4.0]}, "its rates or token counts are no numbers"),
        ({"token_counts": {"7": -3}}, "its rates must be finite and its token counts 0 or more"),
        ({"token_counts": {"7": float("inf")}}, "its rates or token counts are no numbers"),
    ],
)
def test_descriptions_that_cannot_be_true_are_refused_at_once(controller, about, message):
    rewrite(controller, **about)
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"controller imitation.*{message}"):
        LearnedController.load(controller, "imitation")
    assert time.monotonic() - started < 2


def header(content: bytes, length: int | None = None) -> bytes:
    """The head of a safetensors file; `length` is what it claims."""
    return struct.pack("<Q", len(content) if length is None else length) + content


TENSOR = '{"mean":{"dtype":"F32","shape":[%s],"data_offsets":[0,%d]}}'
FILES = {
    "empty": b"",
    "text": b"not a controller at all",
    "a pickle": pickle.dumps({"mean": [0.0]}),
    "a header longer than the file": header(b"{}", 2**40),
    "a header longer than anything": header(b"{}", 2**64 - 1),
    "a header of 200 MB": header(b" " * 1000, 200_000_000),
    "no JSON": header(b"{" * 40),
    "a list": header(b"[]"),
    "a tensor beyond the file": header((TENSOR % ("1000000000000", 4 * 10**12)).encode()),
    "a size that does not fit": header((TENSOR % ("4", 8)).encode()) + bytes(8),
    "an unknown type": header(b'{"mean":{"dtype":"PICKLE","shape":[2],"data_offsets":[0,8]}}') + bytes(8),
    "a negative size": header(b'{"mean":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}') + bytes(8),
    "overlapping tensors": header(
        b'{"mean":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"scale":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    ) + bytes(12),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_safetensors_are_refused(controller, kind):
    (controller / "imitation.safetensors").write_bytes(FILES[kind])
    with pytest.raises(ValueError, match=r"controller imitation\.safetensors: cannot be read"):
        LearnedController.load(controller, "imitation")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100000, "\0"])
def test_descriptions_that_are_no_json_objects_are_refused(controller, content):
    rewrite(controller)
    (controller / "imitation.json").write_text(content)
    with pytest.raises(ValueError, match=r"controller imitation\.safetensors: cannot be read"):
        LearnedController.load(controller, "imitation")
    save_file(
        load_file(controller / "imitation.safetensors"), controller / "imitation.safetensors", {"about": content or "{"}
    )
    with pytest.raises(ValueError, match=r"controller imitation\.safetensors: cannot be read"):
        LearnedController.load(controller, "imitation")


def test_a_controller_of_another_kind_is_refused(controller):
    network(outputs=1).save(controller, "other", ABOUT)
    with pytest.raises(ValueError, match="do not fit its description"):
        LearnedController.load(controller, "other")
    network().save(controller, "settle", ABOUT)
    with pytest.raises(ValueError, match=r"reads unknown feature\(s\) \['entropy', 'rarity'\]"):
        LearnedController.load(controller, "settle")
    assert "entropy" not in SETTLE_FEATURES
    assert {"entropy", "rarity"} <= set(TokenFeatures.__dataclass_fields__)


def test_costs_whose_description_was_damaged_are_measured_again(tmp_path):
    from helpers.training.collection import collect

    model = tiny_model("llama")
    texts = [random_ids(1, 20, seed=seed)[0].tolist() for seed in range(2)]
    table = collect(model, texts, tmp_path / "t.csv", EntropyRule(), block=8)
    costs, price = load_or_measure_costs(model, table, tmp_path / "costs.csv")
    for damage in ("", "[]", "[" * 100000, '{"key": "another"}'):
        (tmp_path / "costs.json").write_text(damage)
        (tmp_path / "costs.csv").write_text("not,the\ncosts,at all\n")
        again, same_price = load_or_measure_costs(model, table, tmp_path / "costs.csv")
        assert again.equals(costs)
        assert price == same_price


# What is imported, and what is asked for


def requirements() -> dict[str, str]:
    """Name of each distribution that is asked for, in normal form -> what the comment beside it says it is for."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    found = {}
    for line in lines:
        demand, _, purpose = line.partition("#")
        if name := re.match(r"[A-Za-z0-9_.-]+", demand if not demand.startswith("-") else ""):
            found[normal(name[0])] = purpose.strip()
    return found


def extras() -> set[str]:
    """Distributions that pyproject.toml names as optional, in normal form."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    demands = [demand for extra in project["optional-dependencies"].values() for demand in extra]
    return {normal(re.match(r"[A-Za-z0-9_.-]+", demand)[0]) for demand in demands}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(paths) -> set[str]:
    """Top-level modules that are imported anywhere in the files, inside functions as well."""
    names = set()
    for path in paths:
        for node in ast.walk(code_of(path)):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    return names


TESTS = sorted((ROOT / "tests").glob("*.py"))
LOCAL = {"helpers", "main", *(path.stem for path in TESTS)}
# Asked for without being imported by this project: commands, and what other packages load.
TOOLS = {"jupyterlab", "ipykernel", "pytest-cov", "pytest-xdist", "ruff", "tabulate"}
BACKENDS = {"optimum-quanto", "hqq"}  # of the stock quantized cache: transformers loads them
TOOLS |= BACKENDS


KNOWN = packages_distributions()


def distributions(modules: set[str]) -> set[str]:
    return {normal(name) for module in modules for name in KNOWN.get(module, [module])}


def test_every_import_is_declared():
    foreign = imported([*MODULES, *NOTEBOOKS, *TESTS]) - set(sys.stdlib_module_names) - LOCAL
    declared = requirements().keys() | extras()
    undeclared = {name for name in foreign if not distributions({name}) & declared}
    assert undeclared == set()


def test_every_requirement_is_imported_or_a_tool_with_a_purpose():
    used = distributions(imported([*MODULES, *NOTEBOOKS, *TESTS]))
    for name, purpose in requirements().items():
        assert purpose, f"{name}: requirements.txt does not say what it is for"
        assert (name in used) != (name in TOOLS), f"{name}: {'listed as a tool' if name in TOOLS else 'never imported'}"
    assert requirements().keys() >= TOOLS


def test_backends_of_the_stock_cache_are_loaded_by_transformers_alone():
    assert requirements().keys() >= BACKENDS
    assert not imported([*MODULES, *NOTEBOOKS]) & {"optimum", "hqq"}


def test_versions_are_bounded_above():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        demand = line.partition("#")[0].strip()
        if demand and not demand.startswith("-"):
            assert "==" in demand or ("<" in demand and ">=" in demand), demand


# Arrows between the packages, and between the modules of each


ORDER = ["io", "cache", "models", "policies", "evaluation", "training", "gate", "publishing"]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "helpers").rglob("*.py"))
}


def imports_of(path: Path, types: bool = True) -> set[str]:
    """Modules of `helpers` that a file imports anywhere: at the top, inside functions, and for `types` alone."""
    into, tree = set(), code_of(path)
    guarded = [node for node in ast.walk(tree) if isinstance(node, ast.If) and dotted(node.test) == "TYPE_CHECKING"]
    only_types = {inner for node in guarded for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in only_types and not types:
            continue
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            into |= {name if name in SOURCES else node.module for name in names}
        elif isinstance(node, ast.Import):
            into |= {alias.name for alias in node.names}
    return {name for name in into if name.split(".")[0] == "helpers"}


def floor(module: str) -> int:
    """The place of a module's package in the order."""
    return ORDER.index(module.split(".")[1])


@pytest.mark.parametrize("module", [module for module in SOURCES if module != "helpers"])
def test_packages_import_only_from_those_before_them(module):
    above = {name for name in imports_of(SOURCES[module]) if name == "helpers" or floor(name) > floor(module)}
    assert above == set()


def test_the_gate_needs_nothing_that_measures_it():
    for module, path in SOURCES.items():
        if module.startswith("helpers.gate.") and not module.startswith("helpers.gate.study"):
            assert not {name for name in imports_of(path) if name.startswith("helpers.gate.study")}, module


def test_modules_import_one_way():
    """They can be put in an order in which each imports only earlier ones, annotations aside."""
    left = {module: imports_of(path, types=False) - {module} for module, path in SOURCES.items()}
    while left:
        ready = {module for module, into in left.items() if not into & left.keys()}
        assert ready, f"these import each other: {sorted(left)}"
        left = {module: into for module, into in left.items() if module not in ready}


def test_modules_do_not_import_from_the_door_of_their_own_package():
    """It imports them: they would run into circles."""
    for module, path in SOURCES.items():
        if path.name != "__init__.py":
            assert not imports_of(path) & {".".join(module.split(".")[:depth]) for depth in (2, 3)}, module


def test_nothing_imports_what_runs_it():
    for path in MODULES:
        assert "main" not in imported([path]), path


def test_results_on_real_texts_hold_numbers_and_pictures_only():
    folder = ROOT / "data" / "smollm2"
    listed = subprocess.run(
        ["git", "ls-files", "data/smollm2", "figures/smollm2"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("this is no git checkout")
    tracked = [ROOT / name for name in listed.stdout.split()]
    assert sum(path.stat().st_size for path in tracked) < 5_000_000
    for path in tracked:
        assert path.suffix in (".csv", ".json", ".png", ".safetensors", ".md"), path
        if path.suffix == ".csv":
            columns = path.read_text(encoding="utf-8").splitlines()[0].split(",")
            assert not {"token_id", "token", "text", "text_id", "context"} & set(columns), path
    assert not {"01_widths.png", "03_widths_at_256.png"} & {path.name for path in tracked}
    assert (folder / "baseline_comparison.csv") in tracked
