"""How little of stage 1 is enough? See __main__.py; the answers are in docs/findings.md."""
