"""docs/api.md says what the endpoints do."""

import re
from pathlib import Path

from freehold.serve.reference import render

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == render()


def test_every_link_leads_somewhere_and_every_refusal_says_why() -> None:
    page = render()
    headings = {
        line.removeprefix("### ").lower().replace(" ", "-") for line in page.splitlines() if line.startswith("###")
    }
    assert set(re.findall(r"\(#([^)]*)\)", page)) <= headings
    rows = [line.split(" | ") for line in page.splitlines() if " | refused | " in line or " | hint | " in line]
    assert len(rows) > 20
    assert all(row[-1].strip(" |") for row in rows)
    assert "| **`max_tokens`** | integer | honoured | Reasoning counts too; at least 1 |" in page
