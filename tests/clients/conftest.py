"""Tests that need what `make test-clients` installs; where a package is missing, none of its."""

import importlib.util

NEEDS = {
    "test_coreax.py": "coreax",
    "test_derivatives.py": "tunix",
    "test_docs.py": "tunix",
    "test_families.py": "tunix",
    "test_goodpoints.py": "goodpoints",
    "test_prefix.py": "tunix",
    "test_tunix.py": "tunix",
    "tiny.py": "tunix",
}
collect_ignore = [name for name, package in NEEDS.items() if not importlib.util.find_spec(package)]
