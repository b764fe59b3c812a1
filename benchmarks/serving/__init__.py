"""How the server serves, measured over HTTP: `python -m benchmarks.serving`."""
