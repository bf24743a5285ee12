# The service alone (`phasewatch serve`): it reads tables, so torch and the trainers, which phasewatch
# as a whole depends on, are left out.
FROM python:3.11.14-slim-bookworm AS build
WORKDIR /build
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY monitor monitor
COPY callbacks callbacks
COPY dashboards dashboards
ENV PIP_CONSTRAINT=/build/constraints.txt PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# What the service imports, in the versions that are tested; the tests hold this list to that.
RUN python -m venv /opt/phasewatch \
    && /opt/phasewatch/bin/pip install \
        anyio duckdb jaxtyping numpy pandas prometheus-client pyarrow starlette typer uvicorn \
    && /opt/phasewatch/bin/pip install --no-deps .

FROM python:3.11.14-slim-bookworm
COPY --from=build /opt/phasewatch /opt/phasewatch
# Nobody that owns anything, here or on the host.
USER 10001:10001
ENV PATH=/opt/phasewatch/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
EXPOSE 8787
HEALTHCHECK --interval=10s --timeout=5s --retries=6 CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8787/readyz', timeout=4)"]
# Every address of the container; which of the host's it is reached by is said where it is published.
ENTRYPOINT ["phasewatch", "serve", "--root", "/runs", "--host", "0.0.0.0", "--port", "8787"]
