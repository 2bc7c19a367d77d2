"""What are several photos of a person worth? See __main__.py; the answers are in docs/findings.md."""
