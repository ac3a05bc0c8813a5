"""Tests that are known to fail, and why: each is a defect that waits for its repair.

A row is (part of the test's id, reason). A test that passes again must lose its row.
"""

from __future__ import annotations

KNOWN_FAILURES: tuple[tuple[str, str], ...] = ()
