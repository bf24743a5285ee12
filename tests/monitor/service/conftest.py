import pytest

from monitor.service import Service


@pytest.fixture
def serve(tmp_path):
    """Serves what is under the temporary folder, or another one."""
    made = []

    def start(root=tmp_path, **options):
        made.append(Service(root, port=0, **options))
        return made[-1]

    yield start
    for service in made:
        service.close()
