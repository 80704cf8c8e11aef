"""transformers' own model tests, taken from the source distribution of the installed version."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers


ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".cache" / f"transformers-{transformers.__version__}"
PACKAGE = FOLDER / "transformers_tests"
# The common tests import these names from folders that the source distribution leaves out.
STAND_INS = {
    "exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "generation/test_utils.py": "class GenerationTesterMixin: ...\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def pip(*args):
    result = subprocess.run([sys.executable, "-m", "pip", *args], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"pip {args[0]} of transformers' tests failed: {result.stderr.strip()[-500:]}")


def fetch_transformers_tests():
    """transformers' `tests/*.py` as the package `transformers_tests`, and `parameterized`, which they import."""
    if (PACKAGE / "__init__.py").exists():
        return
    pip("install", "--no-deps", "--upgrade", "--target", FOLDER, "parameterized")
    requirement = f"transformers=={transformers.__version__}"
    options = ("--no-deps", "--no-build-isolation", "--no-binary", "transformers")
    pip("download", *options, requirement, "-d", FOLDER)
    PACKAGE.mkdir(exist_ok=True)
    with tarfile.open(next(FOLDER.glob("transformers-*.tar.gz"))) as archive:
        for member in archive:
            if member.isfile() and re.fullmatch(r"[^/]+/tests/\w+\.py", member.name):
                (PACKAGE / Path(member.name).name).write_bytes(archive.extractfile(member).read())
    for name, text in STAND_INS.items():
        (PACKAGE / name).parent.mkdir(exist_ok=True)
        (PACKAGE / name).write_text(text)
    # Last, so that an interrupted fetch is repeated.
    (PACKAGE / "__init__.py").touch()


@pytest.mark.slow
def test_transformers_suite():
    fetch_transformers_tests()
    command = [sys.executable, "-m", "pytest", Path(__file__).with_name("transformers_suite.py"), "-q", "-rfs"]
    # transformers' markers aren't ours, so setup.cfg's --strict-markers and the rest of its options go.
    command += ["-o", "addopts=", "-p", "no:cacheprovider", "--disable-warnings", "--tb=short"]
    python_path = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
    environ = {**os.environ, "PYTHONPATH": python_path}
    result = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    print(result.stdout, result.stderr)
    assert result.returncode == 0, result.stdout.strip().splitlines()[-1:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= 99
