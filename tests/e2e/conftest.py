from e2e_tools import metaclaw  # noqa: F401 - a fixture
