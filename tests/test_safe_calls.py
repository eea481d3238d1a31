"""No source runs, unpickles or downloads what others made, but where and how it is meant to."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCES = sorted(
    path
    for folder in ("dti_kernels", "dti_model", "benchmarks", ".ci")
    for path in (ROOT / folder).rglob("*.py")
)
LOADING = "dti_model/model/safe_loading.py"
FETCHING = ("dti_model/downloads.py", "dti_model/model/fetch.py")
# Calls that need constants among their keywords, wherever they are; those of `from_pretrained` on weights need more.
NEEDED = {
    "from_pretrained": {"trust_remote_code": False},
    "torch.load": {"weights_only": True},
}
OF_WEIGHTS = {"use_safetensors": True}
WITHOUT_WEIGHTS = ("AutoConfig", "AutoTokenizer", "PreTrainedTokenizerFast")
NOWHERE = {
    *("eval", "exec", "os.system", "os.popen", "torch.hub.load", "joblib.load", "extractall", "read_pickle"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open", "dill.loads"),
    *("yaml.full_load", "yaml.unsafe_load", "yaml.load_all"),
}
ONLY_WHERE_FETCHED = {
    "urlopen",
    "urlretrieve",
    "snapshot_download",
    "hf_hub_download",
    "ZipFile",
    "requests.get",
}
UNSAFE_OPTIONS = {"shell": True, "allow_pickle": True, "trust_remote_code": True, "weights_only": False}
OF_PIP = {"--only-binary=:all:", "--require-hashes", "--no-deps", "-P"}


def faults(file: str, source: str) -> Iterator[str]:
    """Forbidden calls of a source, with the line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            for fault in _faults_of_call(file, node):
                yield f"{file}:{node.lineno}: {fault}"
        elif isinstance(node, ast.List):
            words = {word.value for word in node.elts if isinstance(word, ast.Constant)}
            if "pip" in words and not words >= OF_PIP:
                yield f"{file}:{node.lineno}: pip without {', '.join(sorted(OF_PIP - words))}"


def _faults_of_call(file: str, call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    options = {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}
    if {name, last} & (NOWHERE - {"eval", "exec"}) or name in ("eval", "exec"):
        yield f"{name} is called"
    if name == "yaml.load" and "Loader=_LOADER" not in [ast.unparse(word) for word in call.keywords]:
        yield "yaml.load without Loader=_LOADER"
    if {name, last} & ONLY_WHERE_FETCHED and file not in FETCHING:
        yield f"{name} is called elsewhere than where data and models are fetched"
    if last == "from_pretrained" and file != LOADING:
        yield f"{name} is called elsewhere than in {LOADING}"
    needed = {
        key: value for of, wanted in NEEDED.items() if of in (name, last) for key, value in wanted.items()
    }
    if last == "from_pretrained" and not name.startswith(WITHOUT_WEIGHTS):
        needed |= OF_WEIGHTS
    yield from (
        f"{name} without {key}={value}" for key, value in needed.items() if options.get(key) is not value
    )
    yield from (f"{key}={value}" for key, value in UNSAFE_OPTIONS.items() if options.get(key) is value)


def test_the_sources() -> None:
    """Nine calls took what transformers have as defaults: pickles where there is nothing else, and a question about code."""
    assert len(SOURCES) > 80
    found = [fault for path in SOURCES for fault in faults(str(path.relative_to(ROOT)), path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("AutoModelForCausalLM.from_pretrained(x, trust_remote_code=False)", "without use_safetensors=True"),
        ("AutoTokenizer.from_pretrained(x)", "AutoTokenizer.from_pretrained without trust_remote_code=False"),
        ("PeftModel.from_pretrained(x, **safe)", "without trust_remote_code=False"),
        ("f(trust_remote_code=True)", "trust_remote_code=True"),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "weights_only=False"),
        ("pickle.load(file)", "pickle.load is called"),
        ("np.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("yaml.load(text, Loader=yaml.Loader)", "yaml.load without Loader=_LOADER"),
        ("eval(text)", "eval is called"),
        ("run(command, shell=True)", "shell=True"),
        ("archive.extractall(folder)", "archive.extractall is called"),
        ("urllib.request.urlopen(url)", "urlopen is called elsewhere"),
        ("run([python, '-m', 'pip', 'download', name])", "pip without --no-deps, --only-binary=:all:"),
    ],
)
def test_the_rule(source: str, fault: str) -> None:
    found = list(faults(LOADING, source))
    assert any(fault in each for each in found), found


def test_loading_is_in_one_place() -> None:
    (fault,) = faults("dti_model/x.py", "AutoConfig.from_pretrained(x, trust_remote_code=False)")
    assert fault == f"dti_model/x.py:1: AutoConfig.from_pretrained is called elsewhere than in {LOADING}"
    assert Path(ROOT / LOADING).is_file()
    assert not list(faults("dti_model/x.py", "model.eval(); json.load(file); np.load(path)"))
