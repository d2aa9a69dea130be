# SPDX-License-Identifier: MIT
"""The package's public names."""

import subprocess
import sys

import pytest

import vfio_mig


def test_every_public_name_is_there_and_no_other_is_announced() -> None:
    assert sorted(name for names in vfio_mig._MODULES.values() for name in names) == sorted(vfio_mig.__all__)
    for name in vfio_mig.__all__:
        found = getattr(vfio_mig, name)
        assert found.__module__.startswith("vfio_mig.")
        assert found.__doc__, f"{name} has no docstring"
        assert name in dir(vfio_mig)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = vfio_mig.no_such_thing


def test_importing_the_package_imports_none_of_its_rooms() -> None:
    code = "import sys, vfio_mig; print([name for name in sys.modules if name.startswith('vfio_mig.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
