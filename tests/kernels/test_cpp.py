"""The kernels' own test program, csrc/tests: built and run as it is, with sanitizers, and for aarch64 in an emulator.

What it checks is in csrc/tests. ThreadSanitizer takes its time, so that it runs only where FREEHOLD_TEST_TSAN is set.
"""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "csrc" / "tests"
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FOR_AARCH64 = (
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    f"-DCMAKE_CXX_COMPILER={CROSS_COMPILER}",
    "-DCMAKE_EXE_LINKER_FLAGS=-static",
)
SHARED_SYMBOLS = {"V", "W", "u"}  # as nm names them: the linker keeps one of several copies

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs CMake and a C++ compiler"
)


def run(*command: str | Path) -> str:
    """Standard output and errors; a failure shows them."""
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900, check=False
    )
    if done.returncode:
        pytest.fail(
            f"{shlex.join(map(str, command))} ended with {done.returncode}:\n{done.stdout[-5000:]}", pytrace=False
        )
    return done.stdout


def build(folder: Path, *options: str) -> Path:
    """The test program, made without a warning."""
    run("cmake", "-S", SOURCE, "-B", folder, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *options)
    output = run("cmake", "--build", folder, "--parallel", "2")
    assert "warning" not in output, output
    return folder / "kernel_test"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def for_aarch64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which(CROSS_COMPILER) is None or shutil.which(EMULATOR) is None:
        pytest.skip(f"needs {CROSS_COMPILER} and {EMULATOR}")
    return build(tmp_path_factory.mktemp("aarch64"), *FOR_AARCH64)


def test_every_instruction_set_of_this_processor(plain: Path) -> None:
    assert run(plain).endswith("all as expected\n")


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_with_sanitizers(sanitizers: str, tmp_path: Path) -> None:
    if sanitizers == "thread" and "FREEHOLD_TEST_TSAN" not in os.environ:
        pytest.skip("takes a minute; runs where FREEHOLD_TEST_TSAN is set")
    trial = tmp_path / "trial.cpp"
    trial.write_text("int main() {}\n")
    if subprocess.run(
        ["c++", f"-fsanitize={sanitizers}", trial, "-o", tmp_path / "trial"], capture_output=True
    ).returncode:
        pytest.skip("this compiler comes without the sanitizers")
    program = build(tmp_path / "build", f"-DFREEHOLD_SANITIZE={sanitizers}")
    assert run(program, "--quick").endswith("all as expected\n")


@pytest.mark.parametrize(("processor", "sets"), [("cortex-a76", "scalar neon"), ("cortex-a53", "scalar")])
def test_on_aarch64(processor: str, sets: str, for_aarch64: Path) -> None:
    """The first processor with dot products, and one without."""
    output = run(EMULATOR, "-cpu", processor, for_aarch64, "--quick")
    assert output.startswith(f"instruction sets: {sets}\n")
    assert output.endswith("all as expected\n")


def test_instruction_sets_share_no_functions(plain: Path, tmp_path: Path) -> None:
    """What one is compiled with must never be linked into code that runs on every processor. Without optimisation,
    every inline function and template that is used shows as a symbol."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm")
    commands = json.loads((plain.parent / "compile_commands.json").read_text())
    files = [entry for entry in commands if Path(entry["file"]).name.startswith("isa_")]
    assert len(files) >= 2
    for entry in files:
        compiled = tmp_path / "unoptimised.o"
        words = shlex.split(entry["command"])
        words[words.index("-o") + 1] = str(compiled)
        run(*words, "-O0")
        symbols = [line.split()[-2:] for line in run(nm, "--defined-only", compiled).splitlines()]
        assert symbols
        assert [name for kind, name in symbols if kind in SHARED_SYMBOLS] == [], entry["file"]
