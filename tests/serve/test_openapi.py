"""The OpenAPI document is true: schemathesis, which makes requests of it and checks the answers by it, finds nothing.

`FREEHOLD_FUZZ` is how many requests it makes up for each operation (default: 4), besides those that it derives from the
document, which it does for the largest bodies only where it is 10 or more. It is not asked to find that every request
that the document allows is taken: a document cannot say which fields exclude each other, nor which ids there are.
"""

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import positive_data_acceptance
from schemathesis.config import OperationConfig, SchemathesisConfig
from schemathesis.openapi import from_dict

from freehold.serve import run
from freehold.serve.app import create_app
from tests.serve.fortress import Fortress, logged
from tests.serve.obedient import serve_obedient

EXAMPLES = int(os.environ.get("FREEHOLD_FUZZ", "4"))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A server on the loopback, and a key for it. Nothing that it was sent made it complain."""
    ready, sockets = threading.Event(), run.bind("127.0.0.1", 0)
    with logged() as log, Fortress(tmp_path_factory.mktemp("openapi"), served=serve_obedient()) as built:
        server = run.Server(built.guarded, drain_timeout=20, on_ready=lambda url: ready.set())
        thread = threading.Thread(target=server.run, kwargs={"sockets": sockets})
        thread.start()
        assert ready.wait(20)
        yield f"http://127.0.0.1:{sockets[0].getsockname()[1]}", built.alice
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive() and not server.server_state.tasks
        assert (built.server.gate.taken, built.runner.stats().running) == (0, 0)
        complaints = [line for line in log.getvalue().splitlines() if '"level": "notice"' not in line]
        assert not complaints, complaints[:5]


def _schema() -> schemathesis.BaseSchema:
    config = SchemathesisConfig()
    if EXAMPLES < 10:  # what is derived from bodies with sixty fields takes a minute
        large = "^/v1/(responses(/input_tokens)?|chat/completions|completions|messages(/count_tokens)?)$"
        config.projects.default.operations.operations.append(
            OperationConfig.from_dict({"include-path-regex": large, "phases": {"coverage": {"enabled": False}}})
        )
    return from_dict(create_app(serve_obedient()).openapi(), config=config)


schema = _schema()


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 10,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_the_document_is_true(case: schemathesis.Case[Any], address: tuple[str, str]) -> None:
    url, key = address
    case.call_and_validate(
        base_url=url,
        headers={"authorization": f"Bearer {key}"},
        excluded_checks=[positive_data_acceptance],
        timeout=60,
    )
