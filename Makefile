# The one command that must pass; .ci/run runs it too.
.PHONY: check
check:
	ruff check .
	ruff format --check .
	mypy
	pytest -q -m ''
