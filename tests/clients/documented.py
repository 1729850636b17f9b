"""The settings that docs/clients.md shows, so that what is tested is what people copy."""

import re
from pathlib import Path

_PAGE = Path(__file__).parents[2] / "docs" / "clients.md"


def shown(client: str, language: str, url: str) -> str:
    """The first block of this language in a client's section, for a server at this address."""
    section = _PAGE.read_text(encoding="utf-8").split(f"\n## {client}\n", 1)[1].split("\n## ", 1)[0]
    found = re.search(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no {language} under {client}"
    assert "http://127.0.0.1:8000" in found[1]
    return found[1].replace("http://127.0.0.1:8000", url)
