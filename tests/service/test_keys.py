"""Keys from options to a running server: read, replaced on SIGHUP, and in no message, environment or log."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import httpx
import pytest

from service.errors import UsageError
from service.gateway.api_keys import KeyRing, keys_of_options
from service.keys import load_keys, reload_keys
from service.settings import load_settings
from tests.service.process import ServerProcess

FROM_FILE, NEXT, FROM_ENVIRONMENT = "sk-from-file-0123", "sk-next-0123456789", "sk-environment-0123"


def key_file(directory: Path, text: str, mode: int = 0o600) -> Path:
    path = directory / "keys.txt"
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def test_without_keys_everybody_may_come() -> None:
    assert load_keys(load_settings({}, {}, None)) is None


def test_options_and_file_count_together(tmp_path: Path) -> None:
    given = {"api_key": f"{NEXT}, {FROM_ENVIRONMENT}", "api_key_file": str(key_file(tmp_path, FROM_FILE))}
    keys = load_keys(load_settings(given, {}, None))
    assert keys is not None
    found = [keys.find(secret.encode()) for secret in (NEXT, FROM_ENVIRONMENT, FROM_FILE)]
    assert [key and key.admin for key in found] == [True, True, False]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"api_key": "two words-secret"}, "^--api-key: .*printable ASCII"),
        ({"api_key": "secret,secret"}, "the same"),
        ({"api_key_file": "/nowhere/secret"}, "^--api-key-file .*No such file"),
        ({"requests_per_minute": "5"}, "^--requests-per-minute limits API keys"),
        ({"api_key": 5}, "^--api-key: "),
    ],
)
def test_what_cannot_be_used_is_said_without_secrets(given: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load_keys(load_settings(given, {"api_key": "--api-key"}, None))
    assert "words-secret" not in str(caught.value)


def test_an_empty_file_is_no_open_door(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no API key"):
        load_keys(load_settings({"api_key_file": str(key_file(tmp_path, "# none yet\n"))}, {}, None))


def test_settings_do_not_show_keys() -> None:
    assert NEXT not in repr(load_settings({"api_key": NEXT}, {}, None))


def test_a_file_others_can_read_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_keys(load_settings({"api_key_file": str(key_file(tmp_path, FROM_FILE, 0o644))}, {}, None))
    assert "chmod 600" in caplog.text
    assert FROM_FILE not in caplog.text


def test_a_file_that_went_bad_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = KeyRing(keys_of_options([FROM_FILE]))
    settings = load_settings({"api_key_file": str(key_file(tmp_path, "two words"))}, {}, None)
    reload_keys(settings, keys)
    assert keys.find(FROM_FILE.encode()) is not None
    assert "stay as they were" in caplog.text
    assert "two words" not in caplog.text


def status(server: ServerProcess, key: str) -> int:
    return httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=60).status_code


def test_a_running_server_takes_new_keys_on_a_signal(tmp_path: Path) -> None:
    path = key_file(tmp_path, FROM_FILE)
    environment = {"TESSERA_API_KEY": FROM_ENVIRONMENT}
    with ServerProcess("--local", "--threads", "1", "--api-key-file", str(path), environment=environment) as server:
        assert "Authorization: Bearer $TESSERA_API_KEY" in server.output
        assert [status(server, key) for key in (FROM_FILE, FROM_ENVIRONMENT, NEXT)] == [200, 200, 401]
        key_file(tmp_path, NEXT)
        server.signal(signal.SIGHUP)
        while status(server, NEXT) != 200:
            time.sleep(0.01)
        assert [status(server, key) for key in (FROM_FILE, FROM_ENVIRONMENT)] == [401, 200]
        output = server.output
    assert not any(key in output for key in (FROM_FILE, NEXT, FROM_ENVIRONMENT))
