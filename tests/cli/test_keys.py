"""`freehold keys`, on a store of its own."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from freehold.cli.main import app
from freehold.errors import NotFoundError, UsageError
from freehold.session.store.keys import hash_secret
from freehold.session.store.store import Store


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREEHOLD_DATA", str(tmp_path))


def _keys(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments])


def test_the_secret_alone_goes_to_stdout_and_opens_what_a_server_reads() -> None:
    made = _keys("create", "laptop", "--requests-per-minute", "60")
    assert made.stderr.startswith("key laptop (key_")
    secret = made.stdout.removesuffix("\n")
    assert secret not in made.stderr
    with Store.open() as store:
        key = store.keys_by_hash()[hash_secret(secret)]
    assert (key.name, key.requests_per_minute, key.tokens_per_minute) == ("laptop", 60, None)


def test_list_shows_all_keys_and_no_secret() -> None:
    secrets = [_keys("create", *arguments).stdout.strip() for arguments in (["laptop"], [], ["phone"])]
    assert _keys("revoke", "phone").stderr.startswith("key phone (fh-")
    listed, as_json = _keys("list").stdout, _keys("list", "--json").stdout
    assert not any(secret in listed or secret in as_json for secret in secrets)
    assert [line.split()[-1] for line in listed.splitlines()[1:3]] == ["active", "active"]
    assert "revoked" in listed.splitlines()[3]
    facts = json.loads(as_json)["keys"]
    assert [(key["name"], key["revoked_at"] is None) for key in facts] == [
        ("laptop", True),
        (facts[1]["id"], True),
        ("phone", False),
    ]


def test_another_store_has_other_keys(tmp_path: Path) -> None:
    there = f"sqlite:///{tmp_path}/other.db"
    assert _keys("create", "laptop", "--store", there).exit_code == 0
    assert json.loads(_keys("list", "--json").stdout)["keys"] == []
    assert len(json.loads(_keys("list", "--json", "--store", there).stdout)["keys"]) == 1


def test_what_cannot_be_done_is_said() -> None:
    assert isinstance(_keys("revoke", "nobody").exception, NotFoundError)
    assert isinstance(_keys("create", "a\nb").exception, UsageError)
    assert isinstance(_keys("create", "--tokens-per-minute", "0").exception, UsageError)
    assert isinstance(_keys("list", "--store", "mysql://h/d").exception, UsageError)
