"""How well the router selects and abstains, on manuals, generated documents and hand-written ones.

`documents` takes pages of documentation packages, `questions` asks about them, `suites` puts both together, `systems`
holds what is compared, `metrics` and `curve` say how they did. `python -m benchmarks.routing` writes the tables.
"""
