"""Names of the Hugging Face hub: what is here comes first, then the cache, then a download; else one sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import stars
from lora import write_adapter
from stars.errors import ModelError, RewardError, TokenizerError
from stars.model import location
from stars.model.bases import base_of
from stars.model.location import HubId, cached, hub_id, located
from stars.model.sharing import SharedWeights
from stars.reward import resolve_reward

hub = pytest.importorskip("huggingface_hub")
constants, errors, utils = (pytest.importorskip(f"huggingface_hub.{name}") for name in ("constants", "errors", "utils"))

COMMIT = "5c3a9b1e0d7f4a2b8c6d5e4f3a2b1c0d9e8f7a6b"
SMALL = dict(cache_tokens=64, max_num_seqs=2, max_num_lanes=4, max_segment_size=16)


def put(cache: Path, repo: str, source: Path | None = None, revision: str = "main", commit: str = COMMIT) -> Path:
    """A repository in a cache as huggingface_hub lays it out: files behind links of their hashes."""
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / revision).write_text(commit)
    (home / "blobs").mkdir(exist_ok=True)
    for number, file in enumerate(sorted(source.iterdir()) if source is not None else ()):
        blob = home / "blobs" / f"{commit[:8]}{number}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a working directory with nothing in it."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "cache"


@pytest.mark.parametrize("given, meant", [
    ("org/name", HubId("org/name")), ("gpt2", HubId("gpt2")), ("org/name.v1@main", HubId("org/name.v1", "main")),
    ("org/name@refs/pr/3", HubId("org/name", "refs/pr/3")),
    ("org/name-GGUF:name.Q4_K_M.gguf", HubId("org/name-GGUF", None, "name.Q4_K_M.gguf")),
    ("org/name@v2:sub/a.GGUF", HubId("org/name", "v2", "sub/a.GGUF")),
    ("models/x.gguf", None), ("dir/model.safetensors", None), ("./org/name", None), ("/org/name", None),
    ("../name", None), ("a/b/c", None), ("org/name:code.py", None), ("org/name:../x.gguf", None), ("org/", None),
    ("org/name:/x.gguf", None), ("gpt2:x.gguf", None), ("http://host/name", None), ("a b/c", None), ("", None),
    ("a/" + "x" * 400, None), ("org/na\0me", None),
])
def test_what_may_be_a_repository(given, meant):
    assert hub_id(given) == meant


def test_what_is_here_comes_first(cache, tiny_model, monkeypatch):
    """A directory and a file of that name, whatever the cache holds; what names no repository is left alone."""
    put(cache, "org/name", tiny_model())
    monkeypatch.setattr(hub, "HfApi", None)
    shutil.copytree(tiny_model(), "org/name")
    assert located("org/name") == "org/name" and located(Path("org/name")) == Path("org/name")
    Path("org/file").write_text("")
    for given in ("org/file", "./nowhere", "/nowhere/else", 3, None, "nowhere"):
        assert located(given) == given


def test_an_engine_of_what_the_cache_holds(cache, tiny_model, run):
    """Models, rewards, named models, tokenizers, and the command line; nothing else is asked for."""
    lm, rm = tiny_model(tokenizer=True), tiny_model(tokenizer=True, head="reward")
    own, reward = put(cache, "org/lm", lm), put(cache, "org/rm", rm)
    other = put(cache, "org/lm", lm, revision="v2", commit=COMMIT[::-1])
    assert located("org/lm") == own and located(Path("org/lm@v2")) == other and located(f"org/lm@{COMMIT}") == own
    engine = stars.Engine("org/lm", "org/rm", models={"guide": "org/lm@v2"}, tokenizer="org/rm", **SMALL)
    params, policy = stars.SamplingParams(max_tokens=4, seed=1), stars.STARS(2, 2, reward_threshold=0.0)
    outputs = [made.generate("a b", params, policy, use_tqdm=False)
               for made in (engine, stars.Engine(lm, rm, **SMALL))]
    assert outputs[0][0].outputs[0].token_ids == outputs[1][0].outputs[0].token_ids
    assert outputs[0][0].outputs[0].reward == outputs[1][0].outputs[0].reward is not None
    assert engine.reward.model == reward and resolve_reward("org/rm").model == reward
    assert stars.CausalReward("org/rm").model == reward and stars.EncoderReward("org/rm").model_path == reward
    [part] = stars.WeightedReward([("org/rm", 2.0)]).parts
    assert part.model == reward
    with pytest.raises(RewardError, match="CausalReward keeps what it has read"):
        stars.CachedReward("org/rm")
    assert [part.model for part in stars.ImplicitReward("org/lm@v2", "org/lm").parts] == [other, own]
    code, out, _ = run("inspect", "org/lm")
    assert code == 0 and str(own) in out


def test_a_snapshot_of_which_a_part_is_there(cache, tiny_model, tmp_path):
    """As a tokenizer that was read alone leaves it; an index names files that are all to be there."""
    source = Path(shutil.copytree(tiny_model(tokenizer=True), tmp_path / "part"))
    weights = (source / "model.safetensors").rename(tmp_path / "kept")
    put(cache, "org/part", source)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    shards = put(cache, "org/shards", source)
    assert cached(HubId("org/part")) is None and cached(HubId("org/part"), weights=False) is not None
    assert located("org/part", weights=False).name == COMMIT and cached(HubId("org/shards")) is None
    with pytest.raises(ModelError, match="org/part is not a directory here, nor is all of it in the cache"):
        stars.Engine("org/part")
    shutil.copy(weights, shards / "1.safetensors")
    assert cached(HubId("org/shards")) == shards
    gguf = put(cache, "org/one")
    (gguf / "a.gguf").write_bytes(b"GGUF")
    assert located("org/one:a.gguf") == gguf / "a.gguf" and cached(HubId("org/one", None, "b.gguf")) is None


def response(status: int) -> object:
    """What the hub's errors are made of."""
    import httpx2

    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co/api/models/org/name"))


def online(monkeypatch, files: list[str] | Exception, arrives: Path | Exception | None = None) -> list[dict]:
    """Stands for the hub: the names that it lists, or what it raises, and where a download then is; what was asked."""
    asked = []

    class Api:
        def model_info(self, repo, *, revision, timeout):
            asked.append(dict(repo=repo, revision=revision, timeout=timeout))
            if isinstance(files, Exception):
                raise files
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])

    def fetch(*given, **options):
        if options.get("local_files_only"):
            raise errors.LocalEntryNotFoundError("not here")
        asked.append(dict(given=given, **options))
        if isinstance(arrives, Exception):
            raise arrives
        return str(arrives)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", fetch)
    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    return asked


def test_what_is_downloaded(cache, tiny_model, monkeypatch):
    """Names first, with a limit of time; then safetensors, JSON and templates alone, of that revision."""
    files = ["config.json", "model.safetensors", "modeling_x.py", "pytorch_model.bin"]
    asked = online(monkeypatch, files, tiny_model())
    assert located("org/name@v2") == tiny_model()
    assert asked[0] == dict(repo="org/name", revision="v2", timeout=location.TIMEOUT) and len(asked) == 2
    assert asked[1]["given"] == ("org/name",) and asked[1]["revision"] == "v2"
    assert 0 < asked[1]["etag_timeout"] <= 10
    allowed = list(utils.filter_repo_objects(
        ["config.json", "model-00001-of-2.safetensors", "tokenizer.json", "chat_template.jinja", "merges.txt",
         "model.py", "pytorch_model.bin", "x.pkl", "a.pt", "consolidated.safetensors", "onnx/model.safetensors",
         "model.gguf", "README.md", "setup.cfg", "weights.npz", "tokenizer.model"],
        allow_patterns=asked[1]["allow_patterns"], ignore_patterns=asked[1]["ignore_patterns"]))
    assert allowed == ["config.json", "model-00001-of-2.safetensors", "tokenizer.json", "chat_template.jinja",
                       "merges.txt"]
    asked = online(monkeypatch, ["a.gguf", "b.gguf"], tiny_model() / "config.json")
    assert located("org/name:b.gguf") == tiny_model() / "config.json"
    assert asked[1]["given"] == ("org/name", "b.gguf") and asked[1]["revision"] is None


BY_HAND = "run `hf download org/name --local-dir DIR` and give DIR"


@pytest.mark.parametrize("given, raised, said", [
    ("org/name", errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set, so nothing is downloaded: where "
                                                         f"there is a network, {BY_HAND}"),
    ("org/name", errors.RepositoryNotFoundError("404\nmore", response=response(404)),
     "the hub has no repository org/name that is open to you: check the name or"),
    ("org/name", errors.GatedRepoError("403", response=response(403)),
     "org/name is gated: accept its terms at https://huggingface.co/org/name and run `hf auth login`"),
    ("org/name@v9", errors.RevisionNotFoundError("404", response=response(404)), "org/name has no revision v9: name"),
    ("org/name", errors.HfHubHTTPError("500 of\nthe server", response=response(500)),
     f"it cannot be downloaded (500 of the server): {BY_HAND}"),
    ("org/name", TimeoutError(), f"it cannot be downloaded (TimeoutError): {BY_HAND}"),
    ("org/name", ConnectionError("no route"), f"it cannot be downloaded (no route): {BY_HAND}"),
    ("org/na--me", errors.HFValidationError("bad"), "nor a name that the Hugging Face hub takes: give the path"),
    ("org/name@v9:a.gguf", errors.OfflineModeIsEnabled(""),
     "run `hf download org/name a.gguf --revision v9 --local-dir DIR` and give DIR/a.gguf"),
    ("org/name", ["pytorch_model.bin", "x/model.safetensors"], "org/name has no weights in safetensors: its other"),
    ("org/name", ["b.gguf", "a.gguf"], "give org/name:FILE with one of its GGUF files (a.gguf, b.gguf)"),
    ("org/name:c.gguf", ["b.gguf", "a.gguf"], "org/name has no file c.gguf: it has a.gguf, b.gguf"),
    ("org/name:c.gguf", ["x"], "org/name has no file c.gguf: it has no GGUF file"),
])
def test_what_cannot_be_had_is_one_sentence(cache, monkeypatch, given, raised, said):
    online(monkeypatch, raised)
    for call in (lambda: stars.Engine(given), lambda: stars.CausalReward(given), lambda: resolve_reward(given)):
        with pytest.raises(ModelError) as caught:
            call()
        assert said in str(caught.value) and "\n" not in str(caught.value) and str(caught.value).startswith(given)


def test_a_download_that_breaks_off_and_a_tokenizer_that_is_none(cache, monkeypatch):
    online(monkeypatch, ["model.safetensors"], OSError(28, "No space left on device"))
    with pytest.raises(ModelError, match="it cannot be downloaded .*No space left on device"):
        located("org/name")
    with pytest.raises(TokenizerError, match="org/name has no tokenizer.json: give the directory"):
        stars.Engine(Path(stars.__file__).parent / "demo_models" / "lm", tokenizer="org/name", cache_tokens=64)
    with pytest.raises(ModelError, match=r"models\['guide'\]: org/other is not a directory here, nor is all of it"):
        stars.Engine(Path(stars.__file__).parent / "demo_models" / "lm", models={"guide": "org/other"})


def test_without_huggingface_hub(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cached(HubId("org/name")) is None and located("gpt2") == "gpt2"
    with pytest.raises(ModelError, match="without huggingface_hub nothing is downloaded: install it .*, or run `hf "):
        located("org/name")


def test_the_environment_is_the_hubs(tmp_path, tiny_model):
    """HF_HOME says where the cache is, and with HF_HUB_OFFLINE nothing waits for a network."""
    snapshot = put(tmp_path / "hub", "org/name", tiny_model())
    code = ("from stars.model.location import located\nprint(located('org/name'))\n"
            "try: located('org/other')\nexcept Exception as error: print(error)")
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120,
                          cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0] == str(snapshot) and "HF_HUB_OFFLINE is set" in lines[1] and len(lines) == 2, done.stderr
    assert time.monotonic() - begin < 60


def test_the_base_of_an_adapter_is_found_in_the_cache(cache, tiny_model, tmp_path, monkeypatch):
    """Where its name is no directory; never downloaded. The engine's own model is taken for a copy of it."""
    lm, other = tiny_model(tokenizer=True), tiny_model(family="qwen2", tokenizer=True)
    adapter = write_adapter(tmp_path / "adapter", lm, named="org/lm")
    monkeypatch.setattr(hub, "HfApi", None)
    with pytest.raises(ModelError, match="an adapter of 'org/lm', which is not a directory here, nor whole in the hub"):
        base_of(adapter)
    snapshot = put(cache, "org/lm", lm)
    assert base_of(adapter) == snapshot
    for own, wanted in ((lm, lm), (other, snapshot), (adapter, snapshot)):
        with SharedWeights(own):
            assert base_of(adapter) == wanted
    made = stars.Engine(adapter, **SMALL).generate("a b", stars.SamplingParams(max_tokens=3, seed=1), use_tqdm=False)
    assert len(made[0].outputs[0].token_ids) > 0


def test_an_adapter_of_another_base_names_what_differs(tiny_model, tmp_path):
    """Names and shapes of both, before any weight is read."""
    wide = tiny_model(family="qwen3", hidden=72)
    adapter = write_adapter(tmp_path / "adapter", tiny_model(family="qwen3"), named=str(wide))
    with pytest.raises((ModelError, RewardError)) as caught:
        stars.Engine(adapter)
    message = str(caught.value)
    assert "adapter of model.layers.0." in message and f"its base {wide} has [72, 52]" in message, message
    assert "[36, 52]" in message and "\n" not in message
