"""Everything runs on a device that is not the CPU, and no training step waits for it: the tests of elsewhere.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_package_works_elsewhere():
    """In a process of its own: a device must be there before the first gradient, and stays the accelerator."""
    tests = Path(__file__).with_name("elsewhere.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    ran = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:]
