"""Personalize many people in one process with one frozen base; see docs/family.md."""
