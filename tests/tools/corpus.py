"""300 documents about invented towns, in every kind that is read; and a PDF, written by hand."""

from pathlib import Path

TOWNS = 300


def name_of(number: int) -> str:
    kind = "pdf" if number % 75 == 4 else ("md", "html", "txt", "py")[number % 5 % 4]
    return f"region{number % 7}/town{number:03}.{kind}"


def write(folder: Path) -> None:
    for number in range(TOWNS):
        path = folder / name_of(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        fact = f"Town {number} has {number * 37 + 5} wells and is known for its uniquefact{number:03}."
        following = f"../{name_of((number + 1) % TOWNS)}"
        filler = [f"Line {line} of the chronicle of town {number}." for line in range(number % 60)]
        match path.suffix:
            case ".md":
                text = [f"# The town of Zed{number}", "", *filler, "", fact, "", f"See [the next town]({following})."]
                path.write_text("\n".join(text))
            case ".html":
                body = "".join(f"<p>{line}</p>" for line in [*filler, fact])
                path.write_text(
                    f"<html><head><title>Zed{number}, a town</title><style>p {{}}</style></head><body>"
                    f"<h1>Zed{number}</h1>{body}<p>See <a href='{following}'>the <b>next</b> town</a> or "
                    "<a href='https://example.com/towns?all=1'>all of them</a>.</p></body></html>"
                )
            case ".pdf":
                path.write_bytes(pdf([[f"Zed{number}", *filler[:20]], [fact]], title=f"Zed{number} in print"))
            case ".py":
                path.write_text(
                    "\n".join([f"# {line}" for line in filler] + [f"def zed{number}():", f'    """{fact}"""'])
                )
            case _:
                path.write_text("\n".join([*filler, fact]))


def pdf(pages: list[list[str]], title: str = "") -> bytes:
    """A small PDF with so many lines on each page."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    objects.append(f"<< /Title ({title}) >>".encode())
    kids = []
    for lines in pages:
        shown = " T* ".join("(" + line.replace("(", r"\(").replace(")", r"\)") + ") Tj" for line in lines)
        stream = f"BT /F1 10 Tf 12 TL 50 750 Td {shown} ET".encode("latin-1")
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
        page = f"/Parent 2 0 R /MediaBox [0 0 600 800] /Contents {len(objects)} 0 R"
        objects.append(f"<< /Type /Page {page} /Resources << /Font << /F1 3 0 R >> >> >>".encode())
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>".encode()
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(objects) + 1
    out += b"xref\n0 %d\n0000000000 65535 f \n%s" % (size, table)
    return out + b"trailer << /Size %d /Root 1 0 R /Info 4 0 R >>\nstartxref\n%d\n%%%%EOF" % (size, out.index(b"xref"))
