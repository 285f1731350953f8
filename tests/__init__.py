"""The tests, in folders as the packages of emupmem; what they share is here."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
FIXTURES = PROJECT / "tests" / "fixtures"
