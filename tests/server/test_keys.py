"""Where API keys come from, and which key a request has."""

from __future__ import annotations

import hmac
import warnings

import pytest

from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.server.keys import ApiKeys, KeyFileWarning, read_keys


def key_file(tmp_path, text, mode=0o600):
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_one_key_per_line_with_comments(tmp_path):
    keys = read_keys(key_file(tmp_path, "# ours\nalpha\n\n  beta  # of Bob\n"))
    assert len(keys) == 2
    assert keys.salt(b"Bearer alpha") and keys.salt(b"bearer beta")
    assert keys.salt(b"Bearer ours") is None and keys.salt(b"Bearer beta#") is None


def test_keys_from_the_environment():
    keys = read_keys(None, {"DSO_API_KEYS": "alpha,beta gamma"})
    assert len(keys) == 3 and keys.salt(b"Bearer gamma")
    assert not read_keys(None, {})


@pytest.mark.parametrize("text", ["", "# none\n\n", "two words\n", "na\u00efve\n"])
def test_a_file_without_a_usable_key_is_an_error(tmp_path, text):
    with pytest.raises(ConfigError):
        read_keys(key_file(tmp_path, text))


def test_a_missing_file_and_an_empty_variable_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path)
    with pytest.raises(ConfigError, match="contains no key"):
        read_keys(None, {"DSO_API_KEYS": " , "})


def test_a_file_that_others_can_read_gives_a_warning(tmp_path):
    with pytest.warns(KeyFileWarning, match="chmod 600"):
        read_keys(key_file(tmp_path, "alpha\n", 0o644))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_keys(key_file(tmp_path, "alpha\n"))


@pytest.mark.parametrize(
    "header", [None, b"", b"alpha", b"Bearer", b"Bearer ", b"Bearer alph", b"Bearer alphaa", b"Basic alpha", b"Bearer \xff\xfe"]
)
def test_anything_else_is_not_a_key(header):
    assert ApiKeys(["alpha"]).salt(header) is None


def test_each_key_has_its_own_salt_that_does_not_contain_it():
    keys = ApiKeys(["alpha", "beta"])
    a, b = keys.salt(b"Bearer alpha"), keys.salt(b"Bearer beta")
    assert a != b and "alpha" not in a
    assert ApiKeys().salt(None) == ""


def test_every_key_is_compared_in_constant_time(monkeypatch):
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    assert ApiKeys(["alpha", "beta", "gamma"]).salt(b"Bearer alpha")
    assert len(compared) == 3 and all(len(a) == len(b) == 32 for a, b in compared)
