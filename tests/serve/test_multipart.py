"""Forms are read the same however they are cut, and what two readers could take for two things is refused."""

import pytest

from freehold.errors import UsageError
from freehold.serve.multipart import Data, FormReader, Part, boundary_of

DISPOSITION = b'Content-Disposition: form-data; name="file"; filename="a.jsonl"'
FORM = (
    b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    b"--B\r\n" + DISPOSITION + b"\r\nContent-Type: text/plain\r\n\r\n"
    b"line\r\n--\r\n--b\r\n--A\r\n\r\nline\r\r\n--B--\r\n"
)
CONTENT = b"line\r\n--\r\n--b\r\n--A\r\n\r\nline\r"


def read(*pieces: bytes) -> list[tuple[Part, bytes]]:
    """The parts of a form that comes in these pieces."""
    reader = FormReader(b"B")
    parts: list[tuple[Part, bytes]] = []
    for piece in pieces:
        for found in reader.feed(piece):
            if isinstance(found, Part):
                parts.append((found, b""))
            else:
                assert isinstance(found, Data) and found.data
                part, so_far = parts[-1]
                parts[-1] = part, so_far + found.data
    reader.flush()
    return parts


def test_a_form_is_the_same_wherever_it_is_cut() -> None:
    whole = [(Part("purpose", None), b"fine-tune"), (Part("file", "a.jsonl"), CONTENT)]
    assert read(FORM) == whole
    for at in range(len(FORM)):
        assert read(FORM[:at], FORM[at:]) == whole
    assert read(*(FORM[at : at + 1] for at in range(len(FORM)))) == whole


def test_a_part_may_be_empty_and_a_form_too() -> None:
    assert read(b"--B\r\n" + DISPOSITION + b"\r\n\r\n\r\n--B--") == [(Part("file", "a.jsonl"), b"")]
    assert read(b"--B--\r\n") == []


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (b'filename="say %22hi%22.jsonl"', 'say "hi".jsonl'),
        (b'filename="say \\"hi\\".jsonl"', 'say "hi".jsonl'),
        (b"filename=a.jsonl", "a.jsonl"),
        ('filename="ж 中 👩.jsonl"'.encode(), "ж 中 👩.jsonl"),
        (b'filename="../../etc/pass%0D%0Awd"', "../../etc/pass\r\nwd"),
        (b'filename="%41"', "%41"),
        (b'filename=""', ""),
    ],
)
def test_names_are_read_as_browsers_and_clients_write_them(written: bytes, name: str) -> None:
    head = b'--B\r\ncontent-disposition:form-data; name="file"; ' + written
    ((part, _),) = read(head + b"\r\n\r\nx\r\n--B--\r\n")
    assert part.filename == name


BAD = {
    "nothing": b"",
    "another boundary": FORM.replace(b"--B\r\n", b"--C\r\n", 1),
    "something before": b"hello\r\n" + FORM,
    "something after": FORM + b"--B\r\n",
    "no end": FORM.removesuffix(b"--\r\n"),
    "cut in its data": FORM[:150],
    "a boundary within a line": b"--Bx\r\n" + FORM[5:],
    "line feeds alone": FORM.replace(b"\r\n", b"\n"),
    "a header that is none": FORM.replace(DISPOSITION, DISPOSITION + b"\r\nhello"),
    "a folded header": FORM.replace(DISPOSITION, DISPOSITION + b"\r\n name=x: y"),
    "no disposition": FORM.replace(DISPOSITION, b"X: y"),
    "no form data": FORM.replace(b"form-data; name=\"file\"", b"attachment; name=\"file\""),
    "no name": FORM.replace(b'; name="file"', b""),
    "two names": FORM.replace(b'; name="file"', b'; name="file"; name="purpose"'),
    "two dispositions": FORM.replace(DISPOSITION, DISPOSITION + b"\r\n" + DISPOSITION),
    "two file names": FORM.replace(b"filename=", b"filename*=utf-8''b; filename="),
    "a name without its end": FORM.replace(b'filename="a.jsonl"', b'filename="a.jsonl'),
    "a name that is not UTF-8": FORM.replace(b"a.jsonl", b"\xff.jsonl"),
    "base64": FORM.replace(DISPOSITION, DISPOSITION + b"\r\nContent-Transfer-Encoding: base64"),
    "files within files": FORM.replace(b"text/plain", b"multipart/mixed; boundary=C"),
    "long headers": FORM.replace(DISPOSITION, DISPOSITION + b"\r\nX: " + b"y" * 10_000),
    "headers without an end": b"--B\r\nX: " + b"y" * 10_000,
    "many parts": b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * 20 + b"--B--",
}  # fmt: skip


@pytest.mark.parametrize("form", BAD.values(), ids=BAD.keys())
def test_what_is_no_form_is_refused_however_it_is_cut(form: bytes) -> None:
    with pytest.raises(UsageError) as whole:
        read(form)
    with pytest.raises(UsageError) as in_bytes:
        read(*(form[at : at + 1] for at in range(len(form))))
    assert str(whole.value) == str(in_bytes.value)


def test_content_types_are_read_strictly() -> None:
    assert boundary_of(b"multipart/form-data; boundary=abc") == b"abc"
    assert boundary_of(b'Multipart/Form-Data;boundary="a b"') == b"a b"
    for refused in (
        b"", b"application/json", b"multipart/form-data", b"multipart/mixed; boundary=abc",
        b"multipart/form-data; boundary=", b"multipart/form-data; boundary=" + b"x" * 71,
        b"multipart/form-data; boundary=a; boundary=b", b'multipart/form-data; boundary="a "',
        b"multipart/form-data; boundary=a<b", b"multipart/form-data; boundary=\xff",
    ):  # fmt: skip
        assert boundary_of(refused) is None, refused
