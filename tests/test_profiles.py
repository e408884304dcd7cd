"""Profiles: written whole, found again, and used only for their machine and model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from deepseek_optimizer import DeepSeekConfig, load_model, profiles
from deepseek_optimizer.errors import ConfigError, DataError
from deepseek_optimizer.integration.load import loader
from deepseek_optimizer.optimized_model import profile_options
from deepseek_optimizer.profiles import Profile, find, machine_identity, model_identity, place, read, save
from deepseek_optimizer.serving import make_engine


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def profile(tiny_model):
    fields = {"threads": 1, "prefill_chunk": 64, "batch_size_range": (1, 3), "kv_cache": "int8"}
    return Profile(machine_identity(), model_identity(tiny_model), "latency", "chat", fields, 2, {"gain": 0.2}, "2026-11-29")


def test_written_and_read(profile, tmp_path, cache):
    path = save(profile, tmp_path / "p.json")
    assert read(path) == replace(profile, path=str(path))
    assert save(profile).parent == cache / "deepseek-optimizer" / "profiles"


def test_found_for_its_model_and_machine_only(profile, tiny_model, tmp_path, monkeypatch):
    assert find(tiny_model, "auto", {}) == (None, find(tiny_model, "auto", {})[1])
    assert "there is no profile of" in find(tiny_model, "auto", {})[1]
    path = save(profile)
    found, note = find(tiny_model, "auto", {})
    assert found == replace(profile, path=str(path)) and "prefill_chunk=64" in note and "goal latency" in note
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    assert find(other, "auto", {})[0] is None
    assert find(other, path, {})[0] is None and "is of another model" in find(other, path, {})[1]
    shutil.copytree(tiny_model, tmp_path / "copy")
    assert find(tmp_path / "copy", "auto", {})[0] is not None  # the same model elsewhere
    monkeypatch.setattr(profiles, "cpu_name", lambda: "another")
    assert find(tiny_model, "auto", {})[0] is None
    assert find(tiny_model, path, {})[0] is None and "is of another machine (cpu:" in find(tiny_model, path, {})[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no JSON", "not a profile of dso tune"),
        ("[]", "not a profile of dso tune; run it"),
        ('{"version": 99}', "version: a profile of another version"),
        ('{"version": 1}', "machine: missing or of another type"),
    ],
)
def test_damaged(profile, tiny_model, tmp_path, text, message):
    """A file that was named is an error; one that was found is not used."""
    path = place(profile.machine, profile.model, {})
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(DataError) as error:
        find(tiny_model, path, {})
    assert message in str(error.value) and path.name in str(error.value)
    assert find(tiny_model, "auto", {})[0] is None and message in find(tiny_model, "auto", {})[1]
    with pytest.raises(FileNotFoundError):
        find(tiny_model, tmp_path / "nowhere", {})


@pytest.mark.parametrize(("name", "given"), [("fields", {"strict": True}), ("drafts", -1), ("drafts", True), ("quality", 3)])
def test_wrong_values(profile, tmp_path, name, given):
    path = save(profile, tmp_path / "p.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), name: given}))
    with pytest.raises(DataError, match=name):
        read(path)


def test_a_model_takes_it_when_asked(profile, tiny_model):
    save(profile)
    plain = load_model(tiny_model)
    assert plain.dso.config.prefill_chunk == 512 and plain.report().profile is None
    tuned = load_model(tiny_model, profile="auto")
    config = tuned.dso.config
    assert (config.threads, config.prefill_chunk, config.batch_size_range, config.kv_cache) == (1, 64, (1, 3), "int8")
    assert "prefill_chunk=64" in tuned.report().profile and "prefill_chunk=64" in tuned.report().to_dict()["profile"]
    with make_engine(tuned) as engine:
        options = engine.core.options
        assert options.step_tokens == 64 and options.batch_size_range == (1, 3)
        assert {count for _, count in tuned_proposers(engine)} == {2}
    with make_engine(tuned, drafts=False) as engine:
        assert not tuned_proposers(engine)


def tuned_proposers(engine):
    drafting = engine.core.drafting
    return [] if drafting is None else drafting._proposers


def test_what_the_user_sets_comes_first(profile, tiny_model):
    save(profile)
    given = load_model(tiny_model, DeepSeekConfig(prefill_chunk=128), profile="auto", batch_size_range=(1, 7)).dso.config
    assert (given.prefill_chunk, given.batch_size_range, given.kv_cache) == (128, (1, 7), "int8")


def test_formats_of_weights(profile, tiny_model, tmp_path):
    """A precision, and what requests read of nested weights, unless a budget chooses formats or the weights are not nested."""
    save(replace(profile, fields={"precision": "int8_nested"}, quality="fast"))
    tuned = load_model(tiny_model, profile="auto")
    assert "quality=fast" in tuned.report().profile and "precision=int8_nested" in tuned.report().profile
    with make_engine(tuned) as engine:
        assert engine.core.options.quality == "fast"
    with make_engine(tuned, quality="exact") as engine:
        assert engine.core.options.quality == "exact"
    other = load_model(tiny_model, profile="auto", kl_budget=0.5).dso
    assert other.config.precision == "auto" and other.profile is not None
    save(replace(profile, fields={"precision": "int8"}, quality="fast"))
    with make_engine(load_model(tiny_model, profile="auto")) as engine:
        assert engine.core.options.quality == "exact"


def test_no_profile(tiny_model):
    model = load_model(tiny_model, profile="auto")
    assert model.dso.config.prefill_chunk == 512 and "there is no profile" in model.report().profile


@pytest.mark.parametrize("drafts", [-1, "many", 1.5])
def test_wrong_drafts(tiny_model, drafts):
    with pytest.raises(ConfigError, match="drafts must be True, False, or a number"):
        make_engine(load_model(tiny_model), drafts=drafts)


def test_another_precision_is_another_profile(profile, tiny_model, tmp_path):
    """What was measured with int8 weights says nothing about others, and does not replace their profile."""
    plain = save(profile)
    other = save(replace(profile, options={"precision": "int8"}))
    assert plain != other
    given = load_model(tiny_model, precision="int8", profile="auto").dso.profile
    assert given is not None and given.path == str(other)
    assert load_model(tiny_model, DeepSeekConfig(precision="int8"), profile="auto").dso.profile == given
    assert load_model(tiny_model, profile="auto").dso.profile.path == str(plain)
    found, note = find(tiny_model, other, {})
    assert found is None and "was found with other options (precision=int8) and is not used" in note
    assert "the default options" in find(tiny_model, plain, {"precision": "int8"})[1]
    assert "(precision=int4)" in find(tiny_model, "auto", {"precision": "int4"})[1]


def test_a_divided_model_takes_no_profile_of_the_whole_one(profile, tiny_model):
    """Its threads are those of each process: two processes would have twice as many."""
    path = save(profile)
    options = profile_options(None, {"parallel": {"tensor": 2, "expert": 1}})
    assert options == profile_options(DeepSeekConfig(parallel={"tensor": 2}), {}) == {"parallel": {"tensor": 2}}
    found, note = find(tiny_model, "auto", options)
    assert found is None and "(parallel={'tensor': 2}) on this machine" in note and "undivided models only" in note
    found, note = find(tiny_model, path, options)
    assert found is None and note.endswith("was found with the default options and is not used; give the same options")
    assert profile_options(None, {"parallel": {"tensor": 1}}) == {}
    with pytest.raises(ConfigError, match="parallel"):
        profile_options(None, {"parallel": {"tensors": 2}})


def test_loading_a_divided_model_leaves_the_profile_out(profile, tiny_model, monkeypatch):
    save(profile)
    given = {}
    model = SimpleNamespace(dso=SimpleNamespace())
    monkeypatch.setattr(loader, "load", lambda path, config, fields, alone, device: given.update(fields) or model)
    load_model(tiny_model, profile="auto", parallel={"tensor": 2})
    assert given == {"parallel": {"tensor": 2}} and model.dso.profile is None
    load_model(tiny_model, profile="auto", parallel={"tensor": 1})
    assert given["threads"] == 1
